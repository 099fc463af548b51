"""Few queries against many keys: a kernel that packs query heads and splits keys, in Triton, its rule and its operator."""
