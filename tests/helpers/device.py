"""The device that tests follow: LONGSPAN_TEST_DEVICE, "cpu" where it is not set. Imports torch alone."""

import os

import torch

DEVICE = torch.device(os.environ.get("LONGSPAN_TEST_DEVICE", "cpu"))


def launches(profile: torch.profiler.profile) -> int:
    """How many kernels a profile saw start on the GPU."""
    return sum(event.count for event in profile.key_averages() if event.key.startswith("cudaLaunchKernel"))


def occupy() -> None:
    """Keep the GPU's current stream busy for some milliseconds, so that what does not wait for it comes too early."""
    if DEVICE.type == "cuda":
        torch.cuda._sleep(20_000_000)
