"""The artifact folder: what is saved is what is loaded; whatever else stands there is refused with a clear error."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from core.make import BASE, direction, lofit, loreft, orthonormal, randn
from hypothesis import given, settings
from hypothesis import strategies as st

from steer_vllm import Intervention, artifact
from steer_vllm.artifact import CONFIG, TENSORS, read_json, write_whole
from steer_vllm.errors import ArtifactInvalid
from steer_vllm.intervention import Card

CARD = Card("a/model", "words ü", "Q: {q}\nA:", {"lr": 1e-3, "seeds": [1, 2]}, {"accuracy": 0.5})
EVERY = {
    "lofit": lofit(card=CARD, default_scale=1.5),
    "loreft": loreft(),
    "untied": loreft(positions="f2+l2/untied"),
    "direction": direction(),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lofit(card=CARD).save(tmp_path / "made")
    return tmp_path / "made"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def rewrite(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def refused(folder: Path, match: str | None = None) -> None:
    with pytest.raises(ArtifactInvalid, match=match) as caught:
        Intervention.load(folder)
    assert str(folder) in caught.value.message, "the message says where"


@pytest.mark.parametrize("name", EVERY)
def test_round_trip(name: str, tmp_path: Path) -> None:
    item = EVERY[name]
    item.save(tmp_path / "deep" / "folder")
    back = Intervention.load(tmp_path / "deep" / "folder")
    assert names(tmp_path / "deep" / "folder") == {CONFIG, TENSORS}
    assert back.digest == item.digest
    for field in dataclasses.fields(item):
        if field.name != "tensors":
            assert getattr(back, field.name) == getattr(item, field.name)
    assert set(back.tensors) == set(item.tensors)
    assert all(torch.equal(back.tensors[n], item.tensors[n]) for n in item.tensors)


def test_digest_is_of_content_only(tmp_path: Path) -> None:
    """Invariant: never its name or path; the card may be edited in place."""
    lofit().save(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    rewrite(tmp_path / "two", description="other", training={"x": 1}, prompt_format=None, default_scale=2)
    assert Intervention.load(tmp_path / "one").digest == Intervention.load(str(tmp_path / "two")).digest


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_stored_dtypes_round_trip(dtype: torch.dtype, tmp_path: Path) -> None:
    item = dataclasses.replace(lofit(), tensors={"offsets": randn(3, BASE.head_dim).to(dtype)})
    item.save(tmp_path)
    assert torch.equal(Intervention.load(tmp_path).tensors["offsets"], item.tensors["offsets"])


def test_tensors_that_share_memory_can_be_saved(tmp_path: Path) -> None:
    """W = R is LoReFT's identity but for b: both may be one tensor, or views of one."""
    R = orthonormal(1, 2, 3, BASE.hidden_size)
    item = dataclasses.replace(loreft(), tensors={"rotate": R, "weight": R, "bias": torch.zeros(1, 2, 3)})
    item.save(tmp_path)
    assert Intervention.load(tmp_path).digest == item.digest


def test_saving_checks_first(tmp_path: Path) -> None:
    item = lofit()
    item.tensors["offsets"][0, 0] = float("nan")
    with pytest.raises(ArtifactInvalid):
        item.save(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_card_that_is_no_json_destroys_nothing(tmp_path: Path) -> None:
    lofit().save(tmp_path)
    before = Intervention.load(tmp_path).digest
    with pytest.raises(TypeError):
        lofit(seed=9, card=Card(training={"model": object()})).save(tmp_path)
    assert Intervention.load(tmp_path).digest == before


TENSOR_ERRORS: dict[str, tuple[Callable[[torch.Tensor], dict[str, torch.Tensor]], str]] = {
    "nan": (lambda t: {"offsets": t.index_fill(0, torch.tensor([1]), float("nan"))}, "NaN or infinite"),
    "inf": (lambda t: {"offsets": t.index_fill(0, torch.tensor([1]), float("inf"))}, "NaN or infinite"),
    "shape": (lambda t: {"offsets": t[:, :-1].contiguous()}, "shape"),
    "rows": (lambda t: {"offsets": t[:-1].contiguous()}, "shape"),
    "flat": (lambda t: {"offsets": t.flatten()}, "shape"),
    "scalar": (lambda t: {"offsets": t[0, 0].clone()}, "shape"),
    "empty": (lambda t: {"offsets": t[:0].contiguous()}, "shape"),
    "whole numbers": (lambda t: {"offsets": t.int()}, "dtype"),
    "booleans": (lambda t: {"offsets": t > 0}, "dtype"),
    "float8": (lambda t: {"offsets": t.to(torch.float8_e5m2)}, "dtype"),
    "complex": (lambda t: {"offsets": t.to(torch.complex64)}, "dtype"),
    "missing": (lambda t: {}, "missing"),
    "renamed": (lambda t: {"offset": t}, "missing"),
    "extra": (lambda t: {"offsets": t, "more": t.clone()}, "unexpected"),
    "many": (lambda t: {"offsets": t, **{f"t{n}": torch.zeros(1) for n in range(3000)}}, "unexpected"),
    "other content": (lambda t: {"offsets": t + 1}, "sha256"),
}


@pytest.mark.parametrize("error", TENSOR_ERRORS)
def test_bad_tensors(error: str, folder: Path) -> None:
    make, match = TENSOR_ERRORS[error]
    safetensors.torch.save_file(make(lofit().tensors["offsets"]), folder / TENSORS)
    refused(folder, match)


def test_rows_of_r_not_orthonormal(tmp_path: Path) -> None:
    item = loreft()
    item.save(tmp_path)
    tensors = {**item.tensors, "rotate": item.tensors["rotate"] * 1.01}
    safetensors.torch.save_file(tensors, tmp_path / TENSORS)
    refused(tmp_path, "not orthonormal")


SETTING_ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown field": ({"colour": 1}, "unknown: .*colour"),
    "newer format": ({"format_version": 2}, "format_version 2, this build reads 1"),
    "format of text": ({"format_version": "1"}, "format_version"),
    "format true": ({"format_version": True}, "format_version"),
    "no format": ({"format_version": None}, "format_version"),
    "unknown method": ({"method": "lora"}, "is none of"),
    "method of another type": ({"method": ["lofit"]}, "is none of"),
    "settings of another method": ({"settings": {"edited_layers": [0], "rank": 2, "tied": True}}, "takes the settings"),
    "settings of another type": ({"settings": None}, "expected an object"),
    "layer beyond": ({"settings": {"heads": [[0, 1], [2, 0], [3, 3]]}}, "layers .3. are not in 0..2"),
    "head beyond": ({"settings": {"heads": [[0, 1], [2, 0], [2, 4]]}}, "heads"),
    "negative layer": ({"settings": {"heads": [[-1, 1], [2, 0], [2, 3]]}}, "heads"),
    "other heads": ({"settings": {"heads": [[0, 1], [2, 0], [2, 2]]}}, "sha256"),
    "positions unknown": ({"positions": "some"}, "positions"),
    "positions of another type": ({"positions": ["all"]}, "positions"),
    "positions other": ({"positions": "response"}, "sha256"),
    "positions untied": ({"positions": "f1+l1/untied"}, "need 2 edits"),
    "scale text": ({"default_scale": "1"}, "default_scale"),
    "scale true": ({"default_scale": True}, "default_scale"),
    "scale null": ({"default_scale": None}, "default_scale"),
    "scale nan": ({"default_scale": float("nan")}, "default_scale"),
    "scale infinite": ({"default_scale": float("inf")}, "default_scale"),
    "scale of 401 digits": ({"default_scale": 10**400}, "default_scale"),
    "digest": ({"sha256": "0" * 64}, "sha256 is 0000"),
    "digest of another type": ({"sha256": 5}, "sha256"),
    "description": ({"description": None}, "description"),
    "prompt format": ({"prompt_format": ["Q"]}, "prompt_format"),
    "training": ({"training": []}, "training"),
    "metrics": ({"metrics": "good"}, "metrics"),
    "base name": ({"base_model": {}}, "base_model"),
    "fingerprint": ({"fingerprint": None}, "fingerprint"),
    "fingerprint field": ({"fingerprint": {**BASE.to_config(), "more": 1}}, "fingerprint"),
    "fingerprint type": ({"fingerprint": {**BASE.to_config(), "num_layers": "3"}}, "fingerprint.num_layers"),
    "fingerprint weights": ({"fingerprint": {**BASE.to_config(), "weights": 7}}, "fingerprint.weights"),
    "other shapes": ({"fingerprint": {**BASE.to_config(), "head_dim": 9}}, "shape"),
}


@pytest.mark.parametrize("error", SETTING_ERRORS)
def test_bad_settings(error: str, folder: Path) -> None:
    changes, match = SETTING_ERRORS[error]
    rewrite(folder, **changes)
    refused(folder, match)


@pytest.mark.parametrize("field", sorted(json.loads(json.dumps(sorted(artifact._FIELDS)))))
def test_every_field_is_needed(field: str, folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    del config[field]
    (folder / CONFIG).write_text(json.dumps(config))
    refused(folder, f"missing: .'{field}'")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"3", b'"text"', b"\xff\xfe", b"\0", b'{"a":' * 5000 + b"1" + b"}" * 5000,
     b"[" * 200_000, b"1" * 5000, b"{" + b" " * (1 << 20) + b"}"],
    ids=lambda content: repr(content[:8]),
)  # fmt: skip
def test_bad_json(content: bytes, folder: Path) -> None:
    (folder / CONFIG).write_bytes(content)
    refused(folder)


def test_truncated_at_every_length(folder: Path) -> None:
    whole = (folder / TENSORS).read_bytes()
    for length in range(len(whole)):
        (folder / TENSORS).write_bytes(whole[:length])
        refused(folder)
    config = (folder / CONFIG).read_bytes()
    (folder / TENSORS).write_bytes(whole)
    for length in range(0, len(config), 7):
        (folder / CONFIG).write_bytes(config[:length])
        refused(folder)


def test_bytes_behind_the_end(folder: Path) -> None:
    with (folder / TENSORS).open("ab") as stream:
        stream.write(b"\0")
    refused(folder)


@pytest.mark.parametrize("header", [2**63, 2**64 - 1, 2**32, (1 << 20) + 1, 0, 1])
def test_header_of_any_size(header: int, folder: Path) -> None:
    (folder / TENSORS).write_bytes(header.to_bytes(8, "little") + b"{}" + b" " * 64)
    refused(folder)


def test_huge_header_that_is_there(folder: Path) -> None:
    header = b"{" + b" " * (2 << 20) + b"}"
    (folder / TENSORS).write_bytes(len(header).to_bytes(8, "little") + header)
    refused(folder, "header of")


def crafted(header: object) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"\0" * 96


@pytest.mark.parametrize(
    "header",
    [
        {"offsets": {"dtype": "F32", "shape": [3, 8], "data_offsets": [0, 1 << 40]}},
        {"offsets": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 96]}},
        {"offsets": {"dtype": "F32", "shape": [3, 8], "data_offsets": [96, 0]}},
        {"offsets": {"dtype": "F32", "shape": [-3, -8], "data_offsets": [0, 96]}},
        {"offsets": {"dtype": "F4", "shape": [24, 8], "data_offsets": [0, 96]}},
        {"offsets": {"dtype": "F8_E8M0", "shape": [12, 8], "data_offsets": [0, 96]}},
        {"offsets": {"dtype": "U16", "shape": [6, 8], "data_offsets": [0, 96]}},
        {"offsets": {"dtype": "nonsense", "shape": [3, 8], "data_offsets": [0, 96]}},
        {"offsets": {"dtype": "F32", "shape": [3, 8]}},
        {"offsets": None},
        {"__metadata__": {"a": 1}},
        {
            "a": {"dtype": "F32", "shape": [3, 8], "data_offsets": [0, 96]},
            "b": {"dtype": "F32", "shape": [3, 8], "data_offsets": [0, 96]},
        },
        [],
        b'{"a":' * 100_000,
        b"\xff" * 64,
    ],
    ids=lambda header: str(header)[:40],
)
def test_crafted_headers(header: object, folder: Path) -> None:
    (folder / TENSORS).write_bytes(crafted(header))
    refused(folder)


@settings(max_examples=200)
@given(data=st.data())
def test_any_flipped_byte_is_found(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing but an artifact's error comes out, and nothing damaged passes: the digest sees to that.

    The header ends in blanks: a tab among them is no damage, and the content the same.
    """
    folder = tmp_path_factory.getbasetemp() / "flipped"
    lofit().save(folder)
    whole = bytearray((folder / TENSORS).read_bytes())
    at = data.draw(st.integers(0, len(whole) - 1))
    before = whole[at]
    whole[at] ^= data.draw(st.integers(1, 255))
    (folder / TENSORS).write_bytes(whole)
    if {before, whole[at]} <= set(b" \t\n\r"):
        assert Intervention.load(folder).digest == lofit().digest
    else:
        refused(folder)


def test_pickles_are_not_read(folder: Path) -> None:
    """A .pt offered under the name of a safetensors file is refused, and never unpickled."""
    torch.save({"offsets": lofit().tensors["offsets"]}, folder / TENSORS)
    refused(folder, "safetensors")
    bomb = b"\x80\x04cbuiltins\neval\n(S'open(\"/nowhere\")'\ntR."
    (folder / TENSORS).write_bytes(bomb)
    refused(folder, "safetensors")


@pytest.mark.parametrize("file", [CONFIG, TENSORS])
class TestNotARegularFile:
    def test_missing(self, file: str, folder: Path) -> None:
        (folder / file).unlink()
        refused(folder, "No such file")

    def test_symlink(self, file: str, folder: Path, tmp_path: Path) -> None:
        (folder / file).rename(tmp_path / "elsewhere")
        (folder / file).symlink_to(tmp_path / "elsewhere")
        refused(folder, "no symlink")

    def test_directory(self, file: str, folder: Path) -> None:
        (folder / file).unlink()
        (folder / file).mkdir()
        refused(folder, "not a regular file")

    def test_pipe(self, file: str, folder: Path) -> None:
        """Does not wait for a writer."""
        (folder / file).unlink()
        os.mkfifo(folder / file)
        refused(folder, "not a regular file")

    def test_oversize(self, file: str, folder: Path) -> None:
        with (folder / file).open("r+b") as stream:
            stream.truncate((1 << 30) + 1)  # sparse
        refused(folder, "at most")


def test_no_handle_is_left_open(folder: Path) -> None:
    opened = Path("/proc/self/fd")
    if not opened.exists():
        pytest.skip("no /proc")
    (folder / TENSORS).unlink()
    (folder / TENSORS).mkdir()
    before = len(names(opened))
    for _ in range(5):
        refused(folder)
    assert len(names(opened)) == before


@pytest.mark.parametrize("name", ["nowhere", "nul\0l", "x" * 5000])
def test_folders_that_cannot_be(name: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactInvalid):
        Intervention.load(tmp_path / name)


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactInvalid):
        Intervention.load(tmp_path / "file")


def test_read_json_limit(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("{}      ")
    assert read_json(tmp_path / "x", 8) == {}
    with pytest.raises(ArtifactInvalid, match="8 bytes, at most 7"):
        read_json(tmp_path / "x", 7)


def test_write_whole(tmp_path: Path) -> None:
    write_whole(tmp_path / "x", b"one")
    write_whole(tmp_path / "x", b"two")
    assert (tmp_path / "x").read_bytes() == b"two"
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o644
    assert names(tmp_path) == {"x"}


@pytest.mark.parametrize("failing", ["fsync", "replace", "chmod"])
def test_a_failed_write_leaves_nothing(failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Disk full in the middle: the old file stands, no temporary one is left."""
    write_whole(tmp_path / "x", b"old")

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    if failing == "chmod":
        monkeypatch.setattr(Path, "chmod", fail)
    else:
        monkeypatch.setattr(*{"fsync": (os, "fsync"), "replace": (Path, "replace")}[failing], fail)
    with pytest.raises(OSError, match="No space"):
        write_whole(tmp_path / "x", b"new")
    monkeypatch.undo()
    assert names(tmp_path) == {"x"}
    assert (tmp_path / "x").read_bytes() == b"old"


def test_interrupted_saving_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its two files a save over another artifact is neither: that is refused, never half of each."""
    lofit().save(tmp_path)
    whole = artifact.write_whole

    def killed(path: Path, content: bytes) -> None:
        if path.name == CONFIG:
            raise KeyboardInterrupt
        whole(path, content)

    monkeypatch.setattr(artifact, "write_whole", killed)
    with pytest.raises(KeyboardInterrupt):
        lofit(seed=8).save(tmp_path)
    refused(tmp_path, "sha256")
