"""Where synthetic defects come from: one module a source, each a `base.DefectSource`, mixed by `synthesize.mixture`."""
