"""Multi-turn rollouts with pictures.  Read `engine.py` last: it joins the others."""
