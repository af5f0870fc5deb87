"""TD-MPC2: implicit world model, value ensemble and policy prior."""
