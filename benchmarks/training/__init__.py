"""The training benchmarks: runs of ours and of the peers, and the data that adapters are tried on."""
