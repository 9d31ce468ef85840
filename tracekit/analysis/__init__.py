"""What datasets say: statistics, differences between two; tables and figures of them."""
