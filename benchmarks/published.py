"""The published sampler in PyTorch, timed on request: the other side of ``benchmarks.peers``.

A script for the Python that has the packages of the published code; it needs nothing of
``ipr_jax``. It reads JSON from standard input, a line that says what to build and then a line per
request, and answers each with a line of JSON. Networks and samplers are those of the clone: as
published, and tuned, which is what its user gets by a few lines without changing results.
"""

import contextlib
import gc
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


def memoise(denoiser: Any) -> None:
    """Embed noise levels once per resolution and evaluation instead of once per block.

    All blocks of one resolution ask for the embedding of the same levels, so outputs keep their
    bits.

    Args:
        denoiser: has ``time_embedding.forward`` and ``forward``, which are replaced.
    """
    embed, predict = denoiser.time_embedding.forward, denoiser.forward
    known: dict[Any, Any] = {}

    def embed_once(t: Any) -> Any:
        if t.shape not in known:
            known[t.shape] = embed(t)
        return known[t.shape]

    def forward(*inputs: Any) -> Any:
        outputs = predict(*inputs)
        known.clear()
        return outputs

    denoiser.time_embedding.forward, denoiser.forward = embed_once, forward


class Published:
    """Answers requests, each a method of that name; what they return is JSON data.

    Attributes:
        models: the network as published, and tuned: memoised, channels last and compiled.
        flops: of one evaluation of each.
    """

    def __init__(self, job: dict[str, Any]):
        """Build what ``build`` needs of ``job``, which also has ``dtype`` and ``batch``.

        Raises:
            SystemExit: memoised, the network predicts something else.
        """
        self.torch = torch = importlib.import_module("torch")
        self.job = job
        (model, self.sampler), (tuned, _) = build(job), build(job)
        self.models = {"published": model, "tuned": tuned}
        channels, (height, width) = job["config"]["channels"], job["config"]["image_size"]
        batch, device = job["batch"], job["device"]
        self.z = torch.randn((batch, 1, channels, height, width), device=device)
        self.t = torch.rand((batch, 1, 1, height, width), device=device)

        memoise(tuned.denoiser)
        counter = importlib.import_module("torch.utils.flop_counter").FlopCounterMode
        self.flops, outputs = {}, []
        for side in self.models:
            with torch.inference_mode(), counter(display=False) as counted:
                outputs.append(self._predict(side, self.z[:1], self.t[:1]))
            self.flops[side] = counted.get_total_flops()
        if not all(map(torch.equal, *outputs)):
            raise SystemExit("the memoised network must predict the same bits as the published one")
        tuned.to(memory_format=torch.channels_last)
        tuned.denoiser.forward = torch.compile(tuned.denoiser.forward, dynamic=False)

    def _predict(self, side: str, z: Any, t: Any) -> Any:
        return self.models[side].forward(z_t=z, t=t, sample=True, use_ema=False)

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

    def predict(self, side: str, given: str, out: str) -> dict[str, Any]:
        """Run a network in float32 on ``z`` [N, C, H, W] and ``t`` [N, H, W] of an .npz file.

        Writes velocity and variance_fraction [N, C, H, W] and sigma [N, 1, H, W] to another one.
        """
        torch, device = self.torch, self.job["device"]
        before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        with np.load(given) as file, torch.inference_mode():
            z, t = (torch.from_numpy(file[name]).to(device) for name in ("z", "t"))
            outputs = self._predict(side, z[:, None], t[:, None, None])
        names = ("velocity", "variance_fraction", "sigma")
        arrays = (output[:, 0].cpu().numpy() for output in outputs)
        np.savez(out, allow_pickle=False, **dict(zip(names, arrays, strict=True)))
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
        return {}

    def network(self, side: str, calls: int) -> dict[str, float]:
        """Seconds of so many evaluations of the whole batch."""

        def run() -> None:
            for _ in range(calls):
                self._predict(side, self.z, self.t)

        return {"seconds": self._seconds(run)}

    def sample(self, side: str) -> dict[str, float]:
        """Seconds of one sample, and its network evaluations."""
        evaluations, model = 0, self.models[side]
        forward = model.forward

        def counted(**arguments: Any) -> Any:
            nonlocal evaluations
            evaluations += 1
            return forward(**arguments)

        model.forward = counted
        gc.collect()
        gc.freeze()  # or the sampler's own gc.collect() would search all that compiling has left
        seconds = self._seconds(lambda: self.sampler(model, z_t=self.z[:1, 0]))
        del model.forward
        return {"evaluations": evaluations, "seconds": seconds}


def main() -> None:
    """Serve standard input until it ends; what the published code prints goes to standard error."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # whoever starts it waits for it
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(found: dict[str, Any]) -> None:
        print(json.dumps(found), file=answers, flush=True)

    job = json.loads(sys.stdin.readline())
    repository = Path(job["repository"])
    sys.path[:1] = [str(repository), str(repository / "srmbench")]
    os.chdir(repository)
    torch = importlib.import_module("torch")
    if job["device"] == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"PyTorch {torch.__version__} sees no GPU, but JAX does")
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # those that JAX has
    if job["device"] == "cuda":
        torch.set_float32_matmul_precision("high")
    published = Published(job)
    answer(
        {
            "torch": torch.__version__,
            "python": sys.version.split()[0],
            "threads": torch.get_num_threads(),
            "flops": published.flops,
        }
    )
    with contextlib.suppress(KeyboardInterrupt):
        for line in sys.stdin:
            request = json.loads(line)
            answer(getattr(published, request.pop("do"))(**request))


if __name__ == "__main__":
    main()
