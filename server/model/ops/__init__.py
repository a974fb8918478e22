"""Single operations of the forward pass, each behind one signature.

Today each has a plain torch form that runs on every device; native CPU and CUDA kernels go behind the same
signatures. `linear`, `norms`, `attention` and `lora` know tensors only: no sequences, adapters or requests.
"""
