"""NeMo 2 checkpoints of Llava as an export target (legacy).

NeMo 2.7 is the last release that loads them: NeMo 3 has no NeMo 2 checkpoints.
"""
