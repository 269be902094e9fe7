"""Networks of few blocks, for tests in which the depth plays no part."""

from dataclasses import replace

from octvideo.models import DenseNetSpec, MobileNetSpec, ResNetSpec, SlowFastSpec, Spec


def cut(spec: Spec, keep: int = 2) -> Spec:
    """The network with `keep` blocks per stage, or a few more where every kind of layer needs them."""
    match spec:
        case SlowFastSpec():
            return replace(spec, slow=cut(spec.slow, keep), fast=cut(spec.fast, keep))
        case ResNetSpec():
            stages = [
                replace(
                    s,
                    temporal_kernels=s.temporal_kernels[: 2 if s.nonlocal_after or s.glore_after else keep],
                    nonlocal_after=s.nonlocal_after and (1,),
                    glore_after=s.glore_after and (1,),
                )
                for s in spec.stages
            ]
        case DenseNetSpec():
            stages = [replace(s, layers=2) for s in spec.stages]
        case MobileNetSpec():
            stages = [replace(s, channels=s.channels[:keep] + s.channels[-1:]) for s in spec.stages]
    return replace(spec, stages=tuple(stages))
