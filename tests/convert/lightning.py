"""Writes the checkpoint of a PyTorch Lightning training, without PyTorch or Lightning."""

import sys
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch_writer import Call, Storage, save, storage, tensor

from convert import torch_file

EXAMPLE = Path(__file__).parents[1] / "golden" / "tiny_even" / "last.ckpt"
RECORDS = {
    ".format_version": b"1",
    ".storage_alignment": b"64",
    "byteorder": sys.byteorder.encode(),
    "version": b"3\n",
    ".data/serialization_id": b"0" * 40,
}
RAW, EMA, AVERAGED = "denoiser.", "ema_denoiser.module.", "ema_denoiser.n_averaged"


def write(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    *,
    ema: Mapping[str, np.ndarray] | None = None,
    optimizer: bool = True,
) -> Path:
    """Write a checkpoint that is like ``EXAMPLE`` but for its tensors.

    Names of the same array object share a storage, as the repeated time embedding does, and are
    one parameter of the optimizer. No more memory is needed than for the largest parameter.

    Args:
        path: where to.
        tensors: the raw weights, with names relative to the denoiser.
        ema: the averaged ones; without them the file has nothing of the average.
        optimizer: whether to write the states of Adam; without, the file is as Lightning writes it
            with ``save_weights_only``.

    Returns:
        The path.
    """
    stores: dict[int, Storage] = {}

    def stored(array: np.ndarray) -> Call:
        store = stores.setdefault(id(array), storage(array, str(len(stores))))
        stride = [int(np.prod(array.shape[axis + 1 :])) for axis in range(array.ndim)]
        return tensor(store, array.shape, tuple(stride))

    arrays = {RAW + name: array for name, array in tensors.items()}
    parameters = list({id(array): array for array in arrays.values()}.values())
    if ema is not None:
        arrays[AVERAGED] = np.array(2, np.int64)
        arrays |= {EMA + name: array for name, array in ema.items()}
    state = OrderedDict((name, stored(array)) for name, array in arrays.items())
    state._metadata = OrderedDict({"": {"version": 1}})  # pyright: ignore

    contents = torch_file.read(EXAMPLE) | {"state_dict": state}
    if optimizer:
        for callback in contents["callbacks"].values():
            callback["kth_value"] = stored(callback["kth_value"])
        adam = contents["optimizer_states"][0]
        adam["param_groups"][0]["params"] = list(range(len(parameters)))
        adam["state"] = {
            index: {
                "step": stored(np.array(2, np.float32)),
                "exp_avg": stored(np.broadcast_to(parameter.dtype.type(1e-3), parameter.shape)),
                "exp_avg_sq": stored(np.broadcast_to(parameter.dtype.type(1e-6), parameter.shape)),
            }
            for index, parameter in enumerate(parameters)
        }
    else:
        for name in ("callbacks", "optimizer_states", "lr_schedulers"):
            del contents[name]
    return save(path, contents, **RECORDS)
