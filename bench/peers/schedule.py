"""Cosine diffusion schedule with respacing, and MAR's generation plan: what the authors compute before any network.

Sources: Nichol & Dhariwal 2021 (cosine schedule, learned range of variances, respacing), MAR section 3.4 (masks).
Everything is float64, as in the authors' code.
"""

import math

import numpy as np

TRAIN_STEPS = 1000


def respaced_timesteps(steps, max_timestep=TRAIN_STEPS - 1):
    """The sorted timesteps that sampling visits: `steps` of them, evenly spread over 0..max_timestep."""
    if not 1 <= steps <= max_timestep + 1 <= TRAIN_STEPS:
        raise ValueError(f"cannot take {steps} steps of the timesteps 0..{max_timestep} of {TRAIN_STEPS}")
    stride = max_timestep / (steps - 1) if steps > 1 else 1.0
    position, taken = 0.0, set()
    for _ in range(steps):  # the running sum and not i * stride: its rounding decides ties
        taken.add(round(position))
        position += stride
    return sorted(taken)


def strided_timesteps(steps):
    """The timesteps of "ddimN": every k-th, for the first integer k that gives exactly N of them."""
    for stride in range(1, TRAIN_STEPS):
        if len(range(0, TRAIN_STEPS, stride)) == steps:
            return list(range(0, TRAIN_STEPS, stride))
    raise ValueError(f"no integer stride over {TRAIN_STEPS} timesteps gives {steps} steps")


def cosine_betas():
    """MAR's noise schedule."""
    def alpha_bar(t):
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    return np.array([min(1 - alpha_bar((i + 1) / TRAIN_STEPS) / alpha_bar(i / TRAIN_STEPS), 0.999) for i in range(TRAIN_STEPS)])


def linear_betas():
    """DiT's noise schedule (Ho et al. 2020)."""
    return np.linspace(0.0001, 0.02, TRAIN_STEPS)


class Diffusion:
    """Tables of the respaced reverse process; each is indexed by the respaced step, 0 the last one taken."""

    def __init__(self, steps, max_timestep=TRAIN_STEPS - 1, full_betas=None, timesteps=None):
        full_betas = cosine_betas() if full_betas is None else full_betas
        self.timestep_map = respaced_timesteps(steps, max_timestep) if timesteps is None else timesteps
        self.steps = len(self.timestep_map)
        acp = np.cumprod(1 - full_betas)[self.timestep_map]
        self.betas = 1 - acp / np.append(1.0, acp[:-1])
        alphas = 1 - self.betas
        acp = np.cumprod(alphas)
        prev = np.append(1.0, acp[:-1])
        self.log_betas = np.log(self.betas)
        self.alphas_cumprod, self.alphas_cumprod_prev = acp, np.append(1.0, acp[:-1])
        self.sqrt_recip_alphas_cumprod = np.sqrt(1 / acp)
        self.sqrt_recipm1_alphas_cumprod = np.sqrt(1 / acp - 1)
        self.posterior_variance = self.betas * (1 - prev) / (1 - acp)
        # The variance of step 0 is 0: its logarithm is replaced by that of step 1.
        floor = self.posterior_variance[1:2] if self.steps > 1 else self.betas
        self.posterior_log_variance_clipped = np.log(np.append(floor, self.posterior_variance[1:]))
        self.posterior_mean_coef1 = self.betas * np.sqrt(prev) / (1 - acp)
        self.posterior_mean_coef2 = (1 - prev) * np.sqrt(alphas) / (1 - acp)


def masked_counts(seq_len, iters):
    """How many tokens are masked before each iteration, and 0 after the last: iters + 1 numbers."""
    counts = [seq_len]
    for i in range(iters - 1):
        counts.append(max(1, min(counts[-1] - 1, math.floor(seq_len * np.cos(math.pi / 2 * (i + 1) / iters)))))
    return counts + [0]


def cfg_scale(cfg, kind, seq_len, masked_after):
    """Guidance scale of one iteration; masked_after is the count that the authors use, at least 1."""
    if kind == "constant":
        return cfg
    if kind == "linear":
        return 1 + (cfg - 1) * (seq_len - max(1, masked_after)) / seq_len
    raise ValueError(f"unknown cfg_schedule {kind!r}")


def joint_diffusion(respacing):
    """DiT's process: "N" steps evenly spread, or "ddimN" at an integer stride."""
    text = str(respacing)
    ddim = text.startswith("ddim")
    steps = int(text[4:] if ddim else text)
    return Diffusion(steps, full_betas=linear_betas(), timesteps=strided_timesteps(steps) if ddim else None)
