"""What an IP-Adapter file is and how it acts on a batch: files, projections, row embeddings and the attention patch."""
