"""What ``make bench`` and ``make prove`` run: contenders side by side, every interleaving, storms, costs and scale."""
