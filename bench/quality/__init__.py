"""Quality of compressed caches."""
