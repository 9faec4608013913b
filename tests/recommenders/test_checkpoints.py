from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from recommenders.checkpoints import (
    FILE_NAME,
    Checkpoint,
    check_same_training,
    delete_checkpoint,
    read_checkpoint,
    with_prefix,
    write_checkpoint,
)
from recommenders.errors import TrainingError


def example() -> Checkpoint:
    tensors = {
        "model.weight": torch.tensor([[1.5, -2.0], [0.1, 3e-30]]),
        "model.step": torch.tensor(7.0),  # a scalar
        "half": torch.tensor([1.0], dtype=torch.bfloat16),  # a type NumPy lacks
        "random": torch.arange(5, dtype=torch.uint8),
        "empty": torch.empty(0, 3),
        "turned": torch.arange(6.0).reshape(2, 3).T,  # not contiguous
    }
    return Checkpoint(tensors, {"epoch": 3, "loss": 0.1 + 0.2, "name": "é"})


def test_what_is_written_is_read_bit_for_bit(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "new folder", example())
    read = read_checkpoint(tmp_path / "new folder")
    assert read is not None
    assert read.facts == example().facts
    assert set(read.tensors) == set(example().tensors)
    for name, tensor in example().tensors.items():
        assert read.tensors[name].dtype == tensor.dtype
        assert torch.equal(read.tensors[name], tensor)


def test_a_folder_without_a_checkpoint_has_none(tmp_path: Path) -> None:
    assert read_checkpoint(tmp_path) is None
    assert read_checkpoint(tmp_path / "absent") is None


def test_parts_are_found_again_by_their_prefix() -> None:
    tensors = with_prefix("model", {"a.b": torch.ones(1)}) | with_prefix("best", {"a.b": torch.zeros(1)})
    assert Checkpoint(tensors, {}).part("best") == {"a.b": torch.zeros(1)}
    assert Checkpoint(tensors, {}).part("mod") == {}


def test_a_newer_checkpoint_replaces_the_older_and_leaves_one_file(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, example())
    write_checkpoint(tmp_path, Checkpoint({"a": torch.ones(1)}, {"epoch": 4}))
    read = read_checkpoint(tmp_path)
    assert read is not None
    assert read.facts == {"epoch": 4}
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_a_write_that_fails_leaves_the_older_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path, example())

    def half(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("recommenders.checkpoints.save_file", half)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(tmp_path, Checkpoint({"a": torch.ones(1)}, {"epoch": 4}))
    monkeypatch.undo()
    read = read_checkpoint(tmp_path)
    assert read is not None
    assert read.facts["epoch"] == 3
    write_checkpoint(tmp_path, example())
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


@pytest.mark.parametrize("kept", [0, 4, 200, -1])
def test_a_file_cut_short_is_refused_with_what_to_do(kept: int, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, example())
    path = tmp_path / FILE_NAME
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(TrainingError, match=r"cannot be read.*Delete the file to train from the first epoch"):
        read_checkpoint(tmp_path)


def test_a_flipped_bit_among_the_numbers_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, example())
    path = tmp_path / FILE_NAME
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(TrainingError, match="do not match their checksum"):
        read_checkpoint(tmp_path)


def test_a_safetensors_file_of_something_else_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / FILE_NAME)
    with pytest.raises(TrainingError, match="has format None"):
        read_checkpoint(tmp_path)


def test_a_checkpoint_of_another_training_is_refused_with_what_differs(tmp_path: Path) -> None:
    expected = {"model": "a", "training pairs": "b", "features": "c"}
    check_same_training(tmp_path, dict(expected), expected)
    with pytest.raises(TrainingError, match=r"other training pairs, features; .*hand in another folder"):
        check_same_training(tmp_path, {"model": "a", "training pairs": "x"}, expected)
    with pytest.raises(TrainingError, match="other model"):
        check_same_training(tmp_path, None, expected)


def test_deleting_is_allowed_where_there_is_nothing(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, example())
    delete_checkpoint(tmp_path)
    delete_checkpoint(tmp_path)
    assert list(tmp_path.iterdir()) == []
