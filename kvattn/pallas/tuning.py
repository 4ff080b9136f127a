"""wip"""
import dataclasses
@dataclasses.dataclass(frozen=True)
class GpuConfig:
    tile: int = 64
    stages: int = 3
    programs: int = 264
def gpu_config(request):
    from kvattn.pallas import interpreted
    return GpuConfig(64, 2, 4) if interpreted() else GpuConfig()
