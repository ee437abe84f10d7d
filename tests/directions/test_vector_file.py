"""One vector from a file."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import tl_latentlens as tll
from tl_latentlens.directions.vector_file import read_vector


def test_read_vector(tmp_path: Path) -> None:

    vector = torch.randn(6)
    np.save(tmp_path / "v.npy", vector.numpy()[None])
    torch.save(vector, tmp_path / "v.pt")
    torch.save({"a": vector * 2, "b": vector}, tmp_path / "d.pt")
    save_file({"a": vector * 2, "b": vector}, tmp_path / "v.safetensors")
    np.savetxt(tmp_path / "v.csv", vector.numpy()[None], delimiter=",")
    np.savetxt(tmp_path / "column.csv", vector.numpy())
    for name, key in [
        ("v.npy", None),
        ("v.pt", None),
        ("d.pt", "b"),
        ("v.safetensors", "b"),
        ("v.csv", None),
        ("column.csv", None),
    ]:
        torch.testing.assert_close(read_vector(tmp_path / name, key=key), vector)
    torch.testing.assert_close(read_vector(tmp_path / "v.safetensors"), vector * 2)
    np.save(tmp_path / "m.npy", np.ones((2, 3)))
    (tmp_path / "text.csv").write_text("not, numbers")
    for name, match in [
        ("none.npy", "no vector at"),
        ("v.bin", "no vector at"),
        ("m.npy", r"holds \(2, 3\); expected one vector"),
        ("text.csv", r"cannot be read as \.csv"),
    ]:
        with pytest.raises(tll.InvalidInputError, match=match):
            read_vector(tmp_path / name)
    with pytest.raises(tll.InvalidInputError, match="holds no tensor 'c'; it has"):
        read_vector(tmp_path / "d.pt", key="c")
