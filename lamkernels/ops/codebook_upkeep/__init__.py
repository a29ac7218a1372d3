"""What a codebook that is learned by averages or loses codes needs after a lookup, in kernels for a GPU."""
