"""x."""
chunk_bwd_kernel = chunk_pairs_bwd_kernel = chunk_scan_bwd_kernel = None
