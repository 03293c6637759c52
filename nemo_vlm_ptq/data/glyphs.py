"""Capital letters of 5x7 cells, drawn without a font of the machine."""

from PIL import ImageDraw

WIDTH, HEIGHT = 5, 7  # cells
# Five columns of each letter in hexadecimal; the lowest bit is the top cell.
COLUMNS = {
    "A": "7E1111117E", "B": "7F49494936", "C": "3E41414122", "D": "7F4141413E", "E": "7F49494941",
    "F": "7F09090901", "G": "3E41415173", "H": "7F0808087F", "I": "00417F4100", "J": "2040413F01",
    "K": "7F08142241", "L": "7F40404040", "M": "7F021C027F", "N": "7F0408107F", "O": "3E4141413E",
    "P": "7F09090906", "Q": "3E4151215E", "R": "7F09192946", "S": "2649494932", "T": "03017F0103",
    "U": "3F4040403F", "V": "1F2040201F", "W": "3F4038403F", "X": "6314081463", "Y": "0304780403",
    "Z": "6159494D43",
}  # fmt: skip


def _runs(letter: str) -> list[tuple[int, int, int]]:
    """Return (column, first row, last row) of the filled vertical runs of a letter."""
    runs = []
    for column, bits in enumerate(bytes.fromhex(COLUMNS[letter])):
        rows = [row for row in range(HEIGHT) if bits >> row & 1]
        for row in rows:
            if row - 1 not in rows:
                last = row
                while last + 1 in rows:
                    last += 1
                runs.append((column, row, last))
    return runs


RUNS = {letter: _runs(letter) for letter in COLUMNS}


def draw_word(
    context: ImageDraw.ImageDraw, word: str, left: int, top: int, cell: int, color: tuple
) -> None:
    """Draw a word; `left`, `top`: its corner, `cell`: side of a cell, all in pixels."""
    for place, letter in enumerate(word):
        start = left + place * (WIDTH + 1) * cell
        for column, first, last in RUNS[letter]:
            x, y = start + column * cell, top + first * cell
            context.rectangle((x, y, x + cell - 1, top + (last + 1) * cell - 1), fill=color)
