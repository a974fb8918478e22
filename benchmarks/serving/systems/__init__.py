"""What is measured: this server and its peers, each as a process that is spoken to over HTTP."""
