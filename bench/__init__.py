"""What ``make bench`` runs: the cost of the operations, measured against the server's own commands in the same run."""
