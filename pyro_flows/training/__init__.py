"""How parameters are trained, whatever they belong to: the loop, the captured step, checkpoints, progress, processes."""

__all__: list[str] = []
