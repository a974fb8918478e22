"""Single operations of the forward pass in torch, for every device.

They take tensors only, and know no sequences, adapters or requests.
"""
