"""Training benchmarks: runs of our code and of peers, and the data that adapters are tested on."""
