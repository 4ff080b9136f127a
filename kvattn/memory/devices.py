"""Accelerators. Data sheets count memory in GB; they are taken by their word, as 10^9 bytes, unless they say GiB.

What a program can use is less (the driver's part, error correction) or, where the maker rounded down, somewhat more:
``jax.devices()[0].memory_stats()["bytes_limit"]`` knows.
"""

from kvattn.memory.specs import DeviceSpec, Table

GB, GIB, TERA = 10**9, 2**30, 1e12
_NVIDIA = "NVIDIA data sheet"
_CLOUD = "docs.cloud.google.com/tpu/docs/"


def _gpu(name: str, memory: int, bandwidth: float, flops: float, source: str) -> DeviceSpec:
    """Memory in GB, bandwidth in GB/s, TFLOP/s of bfloat16 (float16 on T4 and V100)."""
    return DeviceSpec(name=name, memory_bytes=memory * GB, bandwidth=bandwidth * 1e9, flops=flops * TERA, source=source)


def _tpu(name: str, memory: int, bandwidth: float, flops: float, source: str) -> DeviceSpec:
    """A chip: memory in GiB, bandwidth in GB/s, TFLOP/s of bfloat16."""
    return DeviceSpec(
        name=name,
        memory_bytes=memory * GIB,
        bandwidth=bandwidth * 1e9,
        flops=flops * TERA,
        backend="tpu",
        source=_CLOUD + source,
    )


DEVICES = Table(
    "device",
    [
        _gpu("t4", 16, 320, 65, f"{_NVIDIA}: T4"),
        _gpu("v100-16gb", 16, 900, 125, f"{_NVIDIA}: V100 SXM2"),
        _gpu("v100-32gb", 32, 900, 125, f"{_NVIDIA}: V100 SXM2"),
        _gpu("a10", 24, 600, 125, f"{_NVIDIA}: A10"),
        _gpu("a10g", 24, 600, 70, f"{_NVIDIA}: A10G"),
        _gpu("l4", 24, 300, 121, f"{_NVIDIA}: L4"),
        _gpu("a40", 48, 696, 149.7, f"{_NVIDIA}: A40"),
        _gpu("l40", 48, 864, 181, f"{_NVIDIA}: L40"),
        _gpu("l40s", 48, 864, 362, f"{_NVIDIA}: L40S"),
        _gpu("rtx-4090", 24, 1008, 165, "NVIDIA Ada architecture whitepaper"),
        _gpu("a100-40gb", 40, 1555, 312, f"{_NVIDIA}: A100 SXM 40 GB"),
        _gpu("a100-80gb", 80, 2039, 312, f"{_NVIDIA}: A100 SXM 80 GB"),
        _gpu("a100-80gb-pcie", 80, 1935, 312, f"{_NVIDIA}: A100 PCIe 80 GB"),
        _gpu("h100", 80, 3350, 989, f"{_NVIDIA}: H100 SXM"),
        _gpu("h200", 141, 4800, 989, f"{_NVIDIA}: H200 SXM"),
        _gpu("b200", 180, 8000, 2250, f"{_NVIDIA}: DGX B200, an eighth of 1440 GB and 64 TB/s"),
        _tpu("tpu-v4", 32, 1200, 275, "v4"),
        _tpu("tpu-v5e", 16, 819, 197, "v5e"),
        _tpu("tpu-v5p", 95, 2765, 459, "v5p"),
        # Editions of the page differ: 819 and 1640, or 800 and 1600 for v5e and v6e. A floor takes the larger.
        _tpu("tpu-v6e", 32, 1640, 918, "v6e"),
        _tpu("tpu-7x", 192, 7380, 2307, "tpu7x"),
    ],
    {
        "v100": "v100-32gb",
        "a100": "a100-80gb",
        "a100-sxm": "a100-80gb",
        "a100-pcie": "a100-80gb-pcie",
        "h100-sxm": "h100",
        "h200-sxm": "h200",
        "a100-40": "a100-40gb",
        "a100-80": "a100-80gb",
        "4090": "rtx-4090",
        "v4": "tpu-v4",
        "v5e": "tpu-v5e",
        "v5p": "tpu-v5p",
        "v6e": "tpu-v6e",
        "tpu-v6": "tpu-v6e",
        "trillium": "tpu-v6e",
        "7x": "tpu-7x",
        "v7x": "tpu-7x",
        "tpu-v7x": "tpu-7x",
        "tpu7x": "tpu-7x",
        "ironwood": "tpu-7x",
    },
)
"""Devices by name: the GPUs of today's data centres, and TPU chips."""
