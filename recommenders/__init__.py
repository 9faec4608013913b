"""From interactions and feature tables to ranked items."""
