"""What data says: provable pruning, compensation, LASSO and ThiNet at equal FLOPs."""
