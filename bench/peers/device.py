"""Where the peer computes: the CPU, or a CUDA device that torch.set_default_device has made the default."""

import time

import torch


def kind():
    """"cpu" or "cuda": the default device, on which models and draws live."""
    return torch.get_default_device().type


def now():
    """A clock reading after all work enqueued so far is done, so that a part's time is its own."""
    if kind() == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def generator(seed):
    """A seeded generator on the default device."""
    return torch.Generator(device=torch.get_default_device()).manual_seed(seed)
