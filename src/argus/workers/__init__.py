"""Workers, which run engines, and the fleet of them."""
