def test_pack_imports_and_lists_nodes() -> None:
    import luna_refinement

    assert luna_refinement.comfy_entrypoint() is not None
