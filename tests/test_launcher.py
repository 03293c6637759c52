"""The launcher: which rank's reason it reports, and what a rank leaves for it to read."""

import json
import time
from unittest import mock

import pytest
from bad_models import PREFIX
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from nemo_vlm_ptq.distributed import launcher
from nemo_vlm_ptq.errors import UserError, VerificationError
from nemo_vlm_ptq.stages import worker
from nemo_vlm_ptq.workdir.store import in_progress_marker


def failures(tmp_path, monkeypatch, *ended):
    """Failures of ranks that ended with (code, message or None) in the same second."""
    found = {}
    for rank, (code, message) in enumerate(ended):
        path = tmp_path / f"error{rank}.json"
        if message is not None:
            with monkeypatch.context() as patch:
                patch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
                patch.setenv("RANK", str(rank))
                patch.setenv("WORLD_SIZE", str(len(ended)))
                patch.setenv(launcher.PARENT_VARIABLE, "1")
                launcher.report_failure(message, code)
        failure = ProcessFailure(local_rank=rank, pid=1, exitcode=code, error_file=str(path))
        failure.timestamp = int(time.time())
        found[rank] = failure
    return found


@pytest.mark.parametrize(("code", "kind"), [(2, UserError), (3, VerificationError)])
@pytest.mark.parametrize("rank", [0, 1])
def test_the_rank_that_knows_the_reason_is_the_one_that_is_told(
    tmp_path, monkeypatch, capsys, code, kind, rank
):
    """A rank that lost its peer fails too, within the same second, and knows nothing."""
    ended = [(1, None), (1, None)]
    ended[rank] = (code, "layer 3 holds NaN")
    with pytest.raises(kind, match=r"^layer 3 holds NaN$"):
        launcher.explain_failure(failures(tmp_path, monkeypatch, *ended), None)
    assert capsys.readouterr() == ("", "")


KILLED = "rank {} was ended by signal SIGKILL (out of memory?)"


@pytest.mark.parametrize(
    ("ended", "said"),
    [
        ([(0, None), (-9, None)], KILLED.format(1)),
        ([(-9, None), (-15, None)], KILLED.format(0)),  # SIGTERM: ended by the launcher
        ([(-15, None), (-9, None)], KILLED.format(1)),
        ([(1, None), (-9, None)], KILLED.format(1)),  # lost its peer in the same second
        ([(-11, None), (-15, None)], "rank 0 was ended by signal SIGSEGV"),
        ([(-15, None), (1, "KeyError: 'x'")], "rank 1 failed: KeyError: 'x'"),
        ([(1, None), (1, None)], "rank 0 failed: exit code 1, see above"),
    ],
)
def test_the_end_of_a_rank_is_told_in_a_line(tmp_path, monkeypatch, capsys, ended, said):
    assert launcher.explain_failure(failures(tmp_path, monkeypatch, *ended), None) == 1
    assert capsys.readouterr() == ("", f"{PREFIX}{said}\n")
    assert launcher.explain_failure(failures(tmp_path, monkeypatch, *ended), tmp_path / "fp8") == 1
    line = f"{PREFIX}{said} while {tmp_path / 'fp8'} was being written\n"
    assert capsys.readouterr() == ("", line)


def test_the_folder_that_is_being_written_is_found_by_its_marker(tmp_path):
    for parts in (("statistics",), ("fp8", "scales")):
        folder = tmp_path.joinpath(*parts)
        folder.parent.mkdir(exist_ok=True)
        in_progress_marker(folder).touch()
    (tmp_path / "megatron").mkdir()
    found = launcher.folders_in_progress(tmp_path)
    assert set(found) == {tmp_path / "statistics", tmp_path / "fp8" / "scales"}
    assert launcher.folders_in_progress(tmp_path / "none") == {}


@pytest.mark.parametrize(
    ("error", "noted"),
    [
        (KeyError("x"), "KeyError: 'x'"),
        (ValueError("one\ntwo"), "ValueError: one"),
        (RuntimeError("Connection closed by peer [127.0.0.1]:1"), None),
        (UserError("of the user"), None),  # told elsewhere
    ],
)
def test_a_rank_notes_its_own_bug_and_not_that_a_peer_has_gone(tmp_path, monkeypatch, error, noted):
    def fail(*_):
        raise error

    monkeypatch.setattr(worker, "parallel_context", fail)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    path = tmp_path / "note"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    with pytest.raises(type(error)):
        worker.run_worker("run", mock.Mock(recipe=mock.Mock(workdir=str(tmp_path))), {})
    found = json.loads(path.read_text())["message"]["message"] if path.exists() else None
    assert found == noted
