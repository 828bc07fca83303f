"""Scale and update a served model without a failed request (scripts/deploy.py)."""
