"""lpattn's own attention kernels. They consume what :mod:`lpattn.quantize.fused` makes, and know no backend."""
