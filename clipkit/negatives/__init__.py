"""Hard-negative captions: rules that rewrite captions, filters that judge, shards with the negatives in them."""
