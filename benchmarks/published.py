"""The published sampler in PyTorch, timed on request: the other side of ``benchmarks.peers``.

A script for the Python that has the packages of the published code; it needs nothing of
``ipr_jax``. It reads JSON from standard input, a line that says what to build and then a line per
request, and answers each with a line of JSON. Networks and samplers are those of the clone.
"""

import contextlib
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def build(job: dict[str, Any]) -> tuple[Any, Any]:
    """The network with the given weights, and the sampler, both of the clone.

    Args:
        job: ``config``, the fields of the architecture; ``tensors``, an .npz file of its state
            dict; ``device``; ``sampler``, the fields of the sampler's configuration.

    Returns:
        The clone's ``Wrapper`` and its ``IPRSampler``, which scores no samples.
    """
    torch = importlib.import_module("torch")
    wrapper = importlib.import_module("src.model.wrapper")
    denoiser = importlib.import_module("src.model.denoiser.denoiser")
    unet = importlib.import_module("src.model.denoiser.unet")
    parts = importlib.import_module("src.model.denoiser.unet.modules")
    flow = importlib.import_module("src.model.flow")
    noise = importlib.import_module("src.model.time_sampler")
    types = importlib.import_module("src.type_extensions")
    ipr = importlib.import_module("src.sampler.ipr_sampler")

    config = job["config"]
    network = unet.UNetDenoiserCfg(
        hid_dims=config["widths"],
        attention=config["attention"],
        num_blocks=config["num_blocks"],
        t_emb_dim=config["time_width"],
        res_block_cfg=parts.ResBlockCfg(dropout=config["dropout"]),
        attention_cfg=parts.MultiHeadAttentionCfg(num_head_channels=config["head_width"]),
        time_embedding=denoiser.EmbeddingSinusodialCfg("sinusodial", config["num_frequencies"]),
        class_embedding=denoiser.ClassEmbeddingParametersCfg("parameters"),
    )
    whole = wrapper.WrapperCfg(
        conditioning=types.ConditioningCfg(),
        model=wrapper.ModelCfg(
            denoiser=network,
            flow=flow.RectifiedFlowCfg("rectified", variance="learned_range"),
            time_sampler=noise.SharedCfg("shared"),
            learn_sigma=True,
        ),
        loss=wrapper.LossCfg(),
        optimizer=wrapper.OptimizerCfg("AdamW", lr=1e-4),
        patch_size=config["patch_size"],
        train=wrapper.TrainCfg(step_offset=0),
    )
    model = wrapper.Wrapper(whole, config["channels"], config["image_size"]).eval()
    with np.load(job["tensors"]) as file:
        tensors = {name: torch.from_numpy(file[name]) for name in file.files}
    model.denoiser.load_state_dict(tensors, strict=True)

    settings = ipr.IPRSamplerCfg("ipr_sampler", use_ema=False, **job["sampler"])
    grid = tuple(size // config["patch_size"] for size in config["image_size"])
    sampler = ipr.IPRSampler(settings, config["patch_size"], grid)
    ipr.IPR._check = lambda *_: [False]  # is it valid? needs a classifier for some tasks
    return model.to(job["device"]), sampler


class Published:
    """Answers requests, each a method of that name; what they return is JSON data."""

    def __init__(self, job: dict[str, Any]):
        """Build what ``build`` needs of ``job``, which also has ``dtype``."""
        self.torch = importlib.import_module("torch")
        self.job = job
        self.model, self.sampler = build(job)
        channels, (height, width) = job["config"]["channels"], job["config"]["image_size"]
        shape = (1, 1, channels, height, width)
        self.z = self.torch.randn(shape, device=job["device"])
        self.t = self.torch.rand((1, 1, 1, height, width), device=job["device"])

    def _predict(self, z: Any, t: Any) -> Any:
        return self.model.forward(z_t=z, t=t, sample=True, use_ema=False)

    def _seconds(self, function: Callable[[], object]) -> float:
        kind, torch = self.job["device"], self.torch
        autocast = torch.autocast(kind, torch.bfloat16, enabled=self.job["dtype"] == "bfloat16")
        wait = torch.cuda.synchronize if kind == "cuda" else bool
        with torch.inference_mode(), autocast:
            wait()
            start = time.perf_counter()
            function()
            wait()
            return time.perf_counter() - start

    def describe(self) -> dict[str, Any]:
        """Versions and threads, and the arithmetic of one evaluation in FLOPs."""
        torch = self.torch
        counter = importlib.import_module("torch.utils.flop_counter").FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            self._predict(self.z, self.t)
        return {
            "torch": torch.__version__,
            "python": sys.version.split()[0],
            "threads": torch.get_num_threads(),
            "flops": counter.get_total_flops(),
        }

    def predict(self, given: str, out: str) -> dict[str, Any]:
        """Run the network in float32 on ``z`` [N, C, H, W] and ``t`` [N, H, W] of an .npz file.

        Writes velocity and variance_fraction [N, C, H, W] and sigma [N, 1, H, W] to another one.
        """
        torch, device = self.torch, self.job["device"]
        before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        with np.load(given) as file, torch.inference_mode():
            z, t = (torch.from_numpy(file[name]).to(device) for name in ("z", "t"))
            outputs = self._predict(z[:, None], t[:, None, None])
        names = ("velocity", "variance_fraction", "sigma")
        arrays = (output[:, 0].cpu().numpy() for output in outputs)
        np.savez(out, allow_pickle=False, **dict(zip(names, arrays, strict=True)))
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
        return {}

    def network(self, calls: int) -> dict[str, float]:
        """Seconds of one of so many evaluations at batch 1."""

        def run() -> None:
            for _ in range(calls):
                self._predict(self.z, self.t)

        return {"seconds": self._seconds(run) / calls}

    def sample(self) -> dict[str, float]:
        """Seconds of one sample."""
        return {"seconds": self._seconds(lambda: self.sampler(self.model, z_t=self.z[:, 0]))}

    def count(self) -> dict[str, float]:
        """Network evaluations of one sample, and the seconds of this first one."""
        evaluations, forward = 0, self.model.forward

        def counted(**arguments: Any) -> Any:
            nonlocal evaluations
            evaluations += 1
            return forward(**arguments)

        self.model.forward = counted
        seconds = self.sample()["seconds"]
        del self.model.forward
        return {"evaluations": evaluations, "seconds": seconds}


def main() -> None:
    """Serve standard input until it ends; what the published code prints goes to standard error."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # whoever starts it waits for it
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(found: dict[str, Any]) -> None:
        print(json.dumps(found), file=answers, flush=True)

    start = time.perf_counter()
    job = json.loads(sys.stdin.readline())
    repository = Path(job["repository"])
    sys.path[:1] = [str(repository), str(repository / "srmbench")]
    os.chdir(repository)
    torch = importlib.import_module("torch")
    if job["device"] == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"PyTorch {torch.__version__} sees no GPU, but JAX does")
    torch.set_float32_matmul_precision("high")
    published = Published(job)
    answer({"seconds": time.perf_counter() - start})
    with contextlib.suppress(KeyboardInterrupt):
        for line in sys.stdin:
            request = json.loads(line)
            answer(getattr(published, request.pop("do"))(**request))


if __name__ == "__main__":
    main()
