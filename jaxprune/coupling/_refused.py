"""Primitives without a rule, on purpose: why what they touch is pinned.

Every primitive behind the public functions of the supported versions of JAX either has
a rule or stands here; a test finds those that do neither.
"""

_REASONS = {
    "a matrix decomposition mixes all positions": "cholesky_update tridiagonal",
    "it reads or writes mutable memory": """
        accum_grad_in_ref addupdate box_get box_set broadcast_to create_linear empty_ref
        free_ref freeze get log_extend log_read new_box new_log new_ref pin run_state
        swap unpin
    """,
    "it has an effect outside the program": """
        after_all call_exported check create_token dce_sink debug_callback debug_print
        ffi_call inspect_sharding io_callback pure_callback stage tie unreachable
    """,
    "it is one half of a transfer between devices": """
        all_gather_done all_gather_reduced_start all_gather_start all_to_all_done
        all_to_all_start pbroadcast_done pbroadcast_dynamic pbroadcast_start
        ppermute_done ppermute_start precv psend psum_done psum_invariant_start
        psum_start ragged_all_to_all reduce_scatter_done reduce_scatter_start
        unreduced_psum_start unreduced_reduce_scatter_start
    """,
    "it is a kernel for one kind of accelerator": """
        cudnn_fusion dot_product_attention_bwd dot_product_attention_bwd_wrapper
        dot_product_attention_fp8_bwd dot_product_attention_fp8_bwd_wrapper
        dot_product_attention_fp8_fwd dot_product_attention_fp8_fwd_wrapper
        dot_product_attention_fwd dot_product_attention_fwd_wrapper scaled_dot
        scaled_matmul scaled_matmul_wrapper
    """,
    "its inner program has rules of its own, which a smaller one would lose": """
        call call_hi_primitive_linearized core_map custom_jvp_call_jaxpr custom_lin
        custom_partitioning custom_vmap_call eval_jaxpr linear_call platform_index
        shard_map
    """,
    "it reduces by a function of the caller": "reduce reduce_window select_and_scatter",
    "it selects positions of a pooling window": """
        select_and_gather_add select_and_scatter_add
    """,
    "it selects the largest positions": "approx_top_k",
    "it has no operand that can be cut": """
        axis_index dim_as_value dimension_size empty empty2 iota_2x32_shape
        shape_assertion
    """,
    "it annotates the program for the compiler": "xla_metadata_call xla_metadata_value",
    "it operates on random keys": """
        from_edtype philox2x32 philox4x32 threefry4x32 to_edtype
    """,
}

REFUSED: dict[str, str] = {
    name: reason for reason, names in _REASONS.items() for name in names.split()
}
