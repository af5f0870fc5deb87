"""TD-MPC2: implicit world model, ensemble of value networks, and policy prior."""
