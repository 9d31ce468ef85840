"""What datasets say: statistics, differences between two, curves over levels; tables and figures of them."""
