"""The Hugging Face form of a checkpoint is made once, and anew when its folder holds another checkpoint's."""

from __future__ import annotations

import os

from conversions import to_torch_dist
from hf_folders import assert_same_model, write_model

from megatron_spice.convert.hf_form import MADE_FROM, hugging_face_form


def test_a_folder_made_of_one_checkpoint_is_not_taken_for_another(tmp_path):
    first, other = (write_model(tmp_path / name, "qwen2", vocab_size=size) for name, size in (("first", 20), ("other", 30)))
    made = [to_torch_dist(model, tmp_path / f"{model.name}-megatron") for model in (first, other)]
    folder = tmp_path / "run" / "initial_model"
    folder.parent.mkdir()
    assert hugging_face_form(first, folder) == first and not folder.exists(), "it is one already"

    assert hugging_face_form(made[0], folder) == folder
    assert_same_model(first, folder)
    (folder / "mark").touch()
    assert hugging_face_form(made[0], folder) == folder and (folder / "mark").exists(), "the same one is not made again"
    hugging_face_form(made[1], folder)
    assert_same_model(other, folder)

    (folder / "mark").touch()
    os.utime(next(path for path in made[1].rglob("*") if path.is_file()), (1, 1))
    hugging_face_form(made[1], folder)
    assert not (folder / "mark").exists(), "its files are others"
    (folder / MADE_FROM).unlink()
    (folder / "mark").touch()
    hugging_face_form(made[1], folder)
    assert not (folder / "mark").exists(), "of what it was made is not known"
