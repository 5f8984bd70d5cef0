"""What a prompt and its picture are worth: prompt embeddings, and later scorers."""
