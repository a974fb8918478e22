"""Single operations of the forward pass in torch, for every device.

They take only tensors, and don't depend on sequences, adapters or requests.
"""
