"""The quality of pictures: prompt embeddings, scorers, the quality predictor and its drift."""
