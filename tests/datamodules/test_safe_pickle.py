"""Published pickles are read, and what a pickle would run is not."""

import os
import zipfile

import numpy as np
import pytest
import torch

from datamodules.safe_pickle import Embedding, PickleRefused, load_npy, load_pth, npy_shape


class Runs:
    """Pickles as a call of os.system."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def objects(*items):
    array = np.empty(len(items), object)
    array[:] = items
    return array


def save_npy(path, content):
    np.save(path, content, allow_pickle=True)


def save_pth(path, content):
    torch.save([content], path)


@pytest.mark.parametrize(("save", "load"), [(save_npy, load_npy), (save_pth, load_pth)])
def test_a_file_that_would_run_a_command_is_refused_by_name_and_runs_nothing(save, load, tmp_path):
    touched, file = tmp_path / "touched", tmp_path / "evil"
    with file.open("wb") as stream:
        save(stream, objects(1, Runs(f"touch {touched}")) if save is save_npy else {"annos": Runs(f"touch {touched}")})
    with pytest.raises(PickleRefused) as caught:
        load(file)
    assert f"{file}: asks for {os.system.__module__}.system" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not touched.exists()
    # the same file does run it for a reader that trusts it, so the test above can fail
    np.load(file, allow_pickle=True) if save is save_npy else torch.load(file, weights_only=False)
    assert touched.exists()


@pytest.mark.parametrize("name", ["builtins.eval", "numpy.load", "torch.load", "numpy.core.multiarray.fromfile"])
def test_other_functions_of_the_libraries_are_no_names_of_the_format(name, tmp_path):
    module, _, function = name.rpartition(".")
    call = f"c{module}\n{function}\n(X\x01\x00\x00\x001tR.".encode()
    with (tmp_path / "x.npy").open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, {"descr": "|O", "fortran_order": False, "shape": ()})
        stream.write(call)
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("x/data.pkl", call)
    for load, file in ((load_npy, "x.npy"), (load_pth, "x.pth")):
        with pytest.raises(PickleRefused, match=f"asks for {name}"):
            load(tmp_path / file)


def test_arrays_are_read_as_numpy_reads_them(tmp_path):
    content = objects(
        7,
        "a text",
        np.arange(6, dtype=np.float16).reshape(2, 3),
        np.arange(3, dtype=">f4"),
        ["a", "list"],
        (480, 640),
        np.float32(1.5),
        np.int64(9),
        np.str_("of numpy's"),
        {"indices": [1, 2], "latents": np.ones((2, 1), np.float32)},
    )
    np.save(tmp_path / "a.npy", content, allow_pickle=True)
    read = load_npy(tmp_path / "a.npy")
    assert type(read) is np.ndarray
    assert read.shape == npy_shape(tmp_path / "a.npy") == (10,)
    for mine, numpys in zip(read[:9], np.load(tmp_path / "a.npy", allow_pickle=True)[:9], strict=True):
        assert np.asarray(mine).dtype == np.asarray(numpys).dtype
        np.testing.assert_array_equal(mine, numpys)
    np.testing.assert_array_equal(read[9]["latents"], np.ones((2, 1)))


def test_shape_and_order_are_those_of_the_header(tmp_path):
    content = np.asfortranarray(objects(1, "b", 3.0, None, [5], "f").reshape(2, 3))
    np.save(tmp_path / "a.npy", content, allow_pickle=True)
    assert load_npy(tmp_path / "a.npy").tolist() == content.tolist()
    np.save(tmp_path / "plain.npy", np.arange(4))
    assert load_npy(tmp_path / "plain.npy").tolist() == [0, 1, 2, 3]


def test_a_forged_type_does_not_reach_numpy(tmp_path):
    class Forged:
        def __reduce__(self):
            return np.dtype, ("V8",), (3, "|", None, None, None, 8, 1, 63)

    np.save(tmp_path / "a.npy", objects(Forged()), allow_pickle=True)
    with pytest.raises(PickleRefused, match=r"cannot be read \(a type 'V8' of numpy's\)"):
        load_npy(tmp_path / "a.npy")


def test_tensors_of_a_pth_are_left_where_they_are(tmp_path):
    content = [{"file_path": "a.jpg", "annos": [{"bbox": [1.0, 2.0], "e": torch.ones(3), "h": torch.ones(2).half()}]}]
    torch.save(content, tmp_path / "a.pth")
    (read,) = load_pth(tmp_path / "a.pth")
    assert read["file_path"] == "a.jpg"
    assert read["annos"][0]["bbox"] == [1.0, 2.0]
    assert isinstance(read["annos"][0]["e"], Embedding)
    assert isinstance(read["annos"][0]["h"], Embedding)


@pytest.mark.parametrize(("load", "name"), [(load_npy, "a.npy"), (load_pth, "a.pth")])
def test_what_is_cut_off_or_something_else_is_refused_in_one_line(load, name, tmp_path):
    np.save(tmp_path / "a.npy", objects("abc", [1, 2, 3]), allow_pickle=True)
    torch.save([1, "abc"], tmp_path / "a.pth")
    whole = (tmp_path / name).read_bytes()
    for content in (whole[: len(whole) * 2 // 3], b"", b"something else entirely"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(PickleRefused, match="cannot be read") as caught:
            load(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)
