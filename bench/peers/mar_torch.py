"""The PyTorch peer of `margo bench --against pytorch`: a server of JSON lines on standard input and output.

One request a line, one reply a line; a request that fails is answered with {"error": ...} and the server goes on. It
ends when its input ends. Anything that libraries print goes to standard error. README.md has the protocol in full.
"""

import dataclasses
import json
import os
import platform
import resource
import sys
import time
import traceback

import torch

import causal
import device
import dit
from draws import RandomDraws
from eager import EagerSampler
from kl import load_tokenizer
from model import load_mar, read_metadata
from schedule import Diffusion, joint_diffusion, masked_counts
from tuned import TunedSampler

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
SAMPLERS = {"eager": EagerSampler, "tuned": TunedSampler}


def choice(name, value, allowed):
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(map(str, allowed))}")
    return value


def check_batch(request):
    """Checks what every kind of request has."""
    for name in ("batch", "iters", "head_steps"):
        value = getattr(request, name, 1)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}, not a positive integer")
    if request.labels is not None and len(request.labels) != request.batch:
        raise ValueError(f"{len(request.labels)} labels for a batch of {request.batch}")


def check_classes(request, classes):
    bad = [c for c in request.labels or () if not 0 <= c < classes]
    if bad:
        raise ValueError(f"classes {bad} of a model with {classes}")


def choose(subset, count, what):
    """The set of iterations that are executed."""
    chosen = set(range(count)) if subset is None else set(subset)
    outside = [i for i in sorted(chosen) if not 0 <= i < count]
    if outside or not chosen:
        raise ValueError(f"subset {outside} is not within {what} 0..{count - 1}")
    return chosen


@dataclasses.dataclass
class Request:
    """What to sample from a MAR; the fields are those of the "run" command."""

    batch: int
    labels: list | None = None
    iters: int = 64
    head_steps: int = 100
    cfg: float = 1.0
    cfg_schedule: str = "linear"
    temperature: float = 1.0
    max_timestep: int = 999
    subset: list | None = None
    seed: int = 0
    decode: bool = False

    def __post_init__(self):
        choice("cfg_schedule", self.cfg_schedule, ("linear", "constant"))
        check_batch(self)
        self.subset = choose(self.subset, self.iters, "iterations")
        self.diffusion = Diffusion(self.head_steps, self.max_timestep)

    def check(self, mar):
        """Errors that depend on the model."""
        if self.iters > mar.seq_len:
            raise ValueError(f"{self.iters} iterations for {mar.seq_len} tokens")
        check_classes(self, mar.config["class_num"])

    def warm(self, mar):
        """The fields of a short request that meets every size of this one."""
        counts, sizes = masked_counts(mar.seq_len, self.iters), {}
        for i in sorted(self.subset):
            sizes.setdefault(counts[i] - counts[i + 1], i)
        return {"subset": sorted(sizes.values()), "head_steps": min(2, self.head_steps)}


class CausalRequest(Request):
    """What to sample from a causal model, one token at a time."""

    def check(self, mar):
        if self.iters != mar.seq_len or len(self.subset) != mar.seq_len:
            raise ValueError(f"a causal model takes all of its {mar.seq_len} iterations, not {len(self.subset)} of {self.iters}")
        check_classes(self, mar.config["class_num"])

    def warm(self, mar):
        return {"head_steps": min(2, self.head_steps)}


@dataclasses.dataclass
class JointRequest:
    """What to sample from a DiT."""

    batch: int
    labels: list | None = None
    steps: str = "250"  # "N", or "ddimN" for timesteps at an integer stride
    sampler: str = "ddpm"
    cfg: float = 1.0
    cfg_channels: str = "3"
    subset: list | None = None
    seed: int = 0
    decode: bool = False

    def __post_init__(self):
        choice("sampler", self.sampler, ("ddpm", "ddim"))
        choice("cfg_channels", self.cfg_channels, ("3", "all"))
        check_batch(self)
        self.diffusion = joint_diffusion(self.steps)
        self.subset = choose(self.subset, self.diffusion.steps, "steps")

    def check(self, model):
        check_classes(self, model.config["num_classes"])

    def warm(self, _):
        return {"subset": sorted(self.subset)[:2]}


class Clock:
    """Seconds of each iteration by part; `total` holds what the parts leave out as well."""

    def __init__(self):
        self.rows = []

    def iteration(self, index, **seconds):
        self.rows.append({"index": index, **seconds})

    def sum(self, part):
        return sum(row.get(part, 0.0) for row in self.rows)


def load_model(config, weights, mode, dtype):
    """A model of the kind that the configuration (of the file, if none is given) describes, its sampler and request."""
    if config is None:
        config = read_metadata(weights)
    if dit.is_dit(config):
        model = dit.load_dit(config, weights)
        return model, dit.SAMPLERS[mode], JointRequest
    if isinstance(config, dict) and config.get("attention") == "causal":
        model = causal.load_causal(config, weights)
        return model, causal.SAMPLERS[mode], CausalRequest
    return load_mar(config, weights), SAMPLERS[mode], Request


class Peer:
    def __init__(self):
        self.model = self.sampler = self.tokenizer = self.request = None

    def info(self, _):
        return {"python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads(),
                "capability": torch.backends.cpu.get_cpu_capability(), "mkl": torch.backends.mkl.is_available(),
                "mkldnn": torch.backends.mkldnn.is_available(),
                "mkldnn_bf16": bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()),
                "config": torch.__config__.show().splitlines(), "pid": os.getpid()}

    def load(self, request):
        mode = choice("mode", request.get("mode", "eager"), SAMPLERS)
        dtype = DTYPES[choice("dtype", request.get("dtype", "f32"), DTYPES)]
        torch.set_default_device(request.get("device", "cpu"))
        if device.kind() == "cpu":
            torch.set_num_threads(int(request.get("threads") or os.cpu_count()))
        started = device.now()
        self.model = self.sampler = self.tokenizer = self.request = None  # give the memory back first
        reply = {"mode": mode, "threads": torch.get_num_threads()}
        if request.get("config") is not None or request.get("weights") is not None:
            self.model, sampler, self.request = load_model(request.get("config"), request.get("weights"), mode, dtype)
            reply["parameters"] = sum(p.numel() for p in self.model.parameters())
            self.sampler = sampler(self.model, dtype)
        if request.get("tokenizer") is not None:
            t = request["tokenizer"]
            self.tokenizer = load_tokenizer(t.get("config"), t.get("weights"), mode, dtype, t.get("latent_scale"))
            reply["tokenizer_parameters"] = sum(p.numel() for p in self.tokenizer.decoder.parameters())
        if self.sampler is None and self.tokenizer is None:
            raise ValueError("load needs a config, weights or a tokenizer")
        return {**reply, "seconds_total": device.now() - started}

    def need(self, part):
        value = getattr(self, part)
        if value is None:
            raise ValueError(f"no {part} loaded")
        return value

    def sample(self, request, draws=None):
        """Returns (latents [N, c, h, w], pixels or None, reply)."""
        sampler, model = self.need("sampler"), self.model
        request.check(model)
        tokenizer = self.need("tokenizer") if request.decode else None
        clock, cpu = Clock(), time.process_time()
        with sampler.context():
            started = device.now()
            sampler.prepare(request)
            setup = device.now() - started
            latents = sampler.sample(request, draws or RandomDraws(request.seed), clock)
            if latents.dim() == 3:  # tokens; a DiT's are latents already
                latents = model.unpatchify(latents)
        pixels, vae = None, 0.0
        if tokenizer:
            started = device.now()
            pixels = tokenizer.decode(latents)
            vae = device.now() - started
        parts = {part: clock.sum(part) for part in ("enc", "dec", "head", "denoiser")}
        return latents, pixels, {
            "seconds_total": setup + clock.sum("total") + vae, "setup": setup, **parts, "vae": vae,
            "iterations": len(clock.rows), "per_iteration": clock.rows,
            "cpu_seconds": time.process_time() - cpu,
            "tokens_absmax": latents.abs().max().item(), "peak_rss_kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}

    def run(self, request):
        save = request.pop("save", None)
        self.need("model")
        latents, pixels, reply = self.sample(self.request(**request))
        if save:
            from safetensors.torch import save_file
            save_file({"latents": latents.contiguous(), **({} if pixels is None else {"pixels": pixels.contiguous()})}, save)
        return reply

    def warm(self, request):
        """One iteration of each size that the run will have with two head steps each, a causal model's whole run with two,
        two steps of a DiT; the images are decoded if the run's are."""
        request.pop("save", None)
        self.need("model")
        full = self.request(**request)
        full.check(self.model)
        few = {**request, **full.warm(self.model)}
        return {"seconds_total": self.sample(self.request(**few))[2]["seconds_total"]}

    def decode(self, request):
        """The tokenizer alone, on random latents of the size that the model (or height and width) asks for."""
        tokenizer, n = self.need("tokenizer"), int(request.get("batch", 1))
        config = tokenizer.decoder.config
        side = config["resolution"] // 2 ** (len(config["ch_mult"]) - 1)
        if self.model is not None:
            side = self.model.side * self.model.config["patch_size"]
        h, w = int(request.get("height", side)), int(request.get("width", side))
        generator = device.generator(int(request.get("seed", 0)))
        z = torch.randn(n, tokenizer.decoder.post_quant_conv.in_channels, h, w, generator=generator) * tokenizer.scale
        started = device.now()
        tokenizer.decode(z)
        return {"seconds_total": device.now() - started}

    def answer(self, line):
        try:
            request = json.loads(line)
            command = request.pop("cmd", None)
            return getattr(self, choice("cmd", command, ("info", "load", "warm", "run", "decode")))(request)
        except Exception as err:  # noqa: BLE001: every failure is a reply
            traceback.print_exc(file=sys.stderr)
            return {"error": f"{type(err).__name__}: {err}"}


def main():
    # Replies go to the real standard output; whatever else is printed, by C libraries too, to standard error.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    peer = Peer()
    for line in sys.stdin:
        if line.strip():
            replies.write(json.dumps(peer.answer(line)) + "\n")


if __name__ == "__main__":
    main()
