"""The list of faults. Each changes a short text that occurs once in the function named; see `Fault`.

A fault that no longer applies is an error: move it along with the code. A new kind of mistake that a test let pass gets
a line here, beside the test that sees it now.
"""

from mutants import Fault, group

FAULTS: list[Fault] = [
    # Caches ------------------------------------------------------------------------------------------------------
    *group(
        "cache/paged.py",
        """
        test_paged.py::test_copies_and_selections_take_everything_along
        test_paged.py::test_verbs
        test_paged.py::test_rows
        test_paged.py::test_copies_that_cannot_be_are_left_out_under_jit
        test_paged.py::test_copy_on_write
        """,
        ("_copied", "cache, cache.axes)", "cache, cache.axes).replace(values=cache.values)"),
        ("_copied", "cache, cache.axes)", "cache, cache.axes).replace(keys=cache.keys)"),
        ("_selected", "cache.page_table, -1)", "cache.page_table, cache.page_table)"),
        ("_selected", "jnp.where(known, cache.lengths, 0)", "cache.lengths"),
        ("_selected", "cache, cache.axes)", "cache, cache.axes).replace(lengths=cache.lengths[rows[::-1]])"),
        ("_selected", "bits.BAD_COUNT", "0", "test_paged.py::test_copies_and_selections_take_everything_along"),
        ("PagedKVCache.copy_pages", "skipped = sources < 0", "skipped = sources < -1"),
        ("PagedKVCache.copy_pages", "jnp.where(skipped | bad, numbers", "jnp.where(skipped | bad, 0"),
        ("PagedKVCache._beyond", "used > room", "used > room + 1"),
        ("PagedKVCache.vouched", "status=status), bad", "status=status), jnp.zeros_like(bad)"),
        ("PagedKVCache.pages_outside", "self.page_table >= end", "self.page_table > end"),
        ("PagedKVCache._refuse_shared_writes", "next_one, next_one)", "next_one - 1, next_one)"),
    ),
    *group(
        "cache/pages.py",
        """
        test_blocks.py::test_blocks_of_pages
        test_blocks.py::test_a_pool_of_40000_pages
        test_paged.py::test_rows
        """,
        ("Pages.take", "i * count", "i"),
        ("Pages.take", "axis=-1)", "axis=-1).astype(jnp.int16)", "test_blocks.py::test_a_pool_of_40000_pages"),
        (
            "Pages._page",
            "self.columns - 1), axis=-1)",
            "self.columns - 1), axis=-1).astype(jnp.int16).astype(jnp.int32)",
            "test_blocks.py::test_a_pool_of_40000_pages",
        ),
        ("Pages._page", "page >= 0", "page > 0"),
        ("Pages._page", "*pool.shape[:2])", "*pool.shape[:2]) - 1"),
        ("Pages.put", "index < self.columns", "index <= self.columns"),
        ("Pages.put", "new.swapaxes(0, 1)", "new.swapaxes(0, 1)[:, :, ::-1]"),
        ("Pages.write", "slots < self.num_slots", "slots <= self.num_slots"),
        ("Pages.write", "slots >= 0", "slots > 0"),
        ("Pages._gather", "x.swapaxes(2, 3).reshape", "x.reshape"),
    ),
    *group(
        "cache/pages.py",
        """
        test_paged_policies.py::test_heads_give_back_the_pages_that_they_do_not_need
        test_paged_policies.py::test_a_tail_of_a_head_is_copied_by_itself
        """,
        ("Pages._strip", "pages - count)", "pages - count + 1)"),
        ("Pages.copied", "head * count + x", "x"),
    ),
    *group(
        "cache/paged.py",
        """
        test_paged_policies.py::test_heads_give_back_the_pages_that_they_do_not_need
        test_paged_policies.py::test_tables_of_heads_are_checked_head_by_head
        test_paged_policies.py::test_rows_with_a_memory_take_over_nobodys_tokens
        test_paged_policies.py::test_copy_on_write_takes_everything_along
        test_paged_groups.py::test_one_table_for_all
        """,
        ("_compacted", "cache.policy.moved(cache.state, order)", "cache.state"),
        ("PagedKVCache._refuse_shared_writes", "self.num_pages + heads + pages", "heads + pages"),
        ("PagedKVCache.with_tables", "self.forgotten(lengths == 0, self.state)", "self.state"),
        ("_selected", "cache.forgotten(~known, cache.state)", "cache.forgotten(known, cache.state)"),
    ),
    *group(
        "cache/groups.py",
        """
        test_paged_groups.py::test_pages_at_once_are_those_that_the_rule_needs
        test_paged_groups.py::test_groups_of_every_kind
        """,
        ("pages_at_once", "if policy.in_order", "if policy.mask().window is not None"),
        ("groups_of", "i if cache.policy.is_uneven else None", "None"),
    ),
    *group(
        "policies/window.py",
        "test_paged_policies.py::test_a_prefix_behind_a_window_is_shared",
        ("OrderedWindow.first_needed", "lengths - (self._counted - 1)", "lengths - self._counted"),
    ),
    *group(
        "policies/fastgen.py",
        "test_paged_policies.py::test_what_is_remembered_of_a_token_moves_with_it",
        ("FastGen.moved", "scores=there(state.scores)", "scores=state.scores"),
        ("FastGen.moved", "kinds=there(state.kinds)", "kinds=state.kinds"),
    ),
    *group(
        "sharding/pages.py",
        "test_paged_groups.py::test_on_a_mesh_heads_have_their_own_strips",
        ("with_own_pages", "(axes is None and cache.page_table.ndim == 2)", "axes is None"),
        ("check_tables", "(shards == 1 and table.ndim == 2)", "shards == 1"),
    ),
    *group(
        "sharding/sequence.py",
        "test_paged_groups.py::test_what_devices_measured_of_their_pages_adds_up",
        ("Share.all_slots", "jax.lax.psum(x, self.axis)", "x"),
    ),
    *group(
        "cache/layout.py",
        """
        test_blocks.py::test_blocks_of_a_layout
        test_sharding_placing.py
        """,
        ("Layout.write", "slots < 0, self.num_blocks", "slots < 0, self.num_blocks - 1"),
        (
            "Layout.write",
            'blocks.at[index].set(x.astype(blocks.dtype), mode="drop")',
            'blocks.at[index].set(x.astype(blocks.dtype), mode="clip")',
        ),
        (
            "Layout.write",
            'x.swapaxes(1, 2).astype(blocks.dtype), mode="drop")',
            'x.swapaxes(1, 2).astype(blocks.dtype), mode="clip")',
        ),
        ("Layout.write", "slots // self.rows)", "slots // self.rows * 0)"),
        ("Layout.write", "k = jnp.arange(heads, dtype=jnp.int32)", "k = 0 * jnp.arange(heads, dtype=jnp.int32)"),
        ("Layout.put", 'mode="drop"', 'mode="clip"'),
        ("Layout.take", "blocks, i, 0", "blocks, 0 * i, 0"),
        ("Layout.divided", "// (unit * parts)) * unit * parts", "// (unit * parts)) * unit"),
        ("Layout.num_blocks", "-(-self.num_slots // self.rows)", "self.num_slots // self.rows"),
    ),
    *group(
        "cache/host.py",
        """
        test_host_caches.py::test_tokens_are_written_where_they_belong[None]
        test_host_caches.py::test_verbs
        """,
        ("_write.write.change", "jnp.where(number == i, slots % rows, -1)", "slots % rows"),
        ("_write.write.change", "jnp.where(number == i, slots % rows, -1)", "jnp.where(number == i, slots, -1)"),
        (
            "_write.write",
            "jnp.where(slots < 0, layout.num_blocks, slots // rows)",
            "jnp.maximum(slots, 0) // rows",
            "test_host_caches.py::test_only_blocks_that_take_tokens_go_back",
        ),
        ("_changed", "jnp.sum(touched, dtype=jnp.int32)", "jnp.sum(touched, dtype=jnp.int32) - 1"),
        ("_changed", "jnp.argsort(~touched)", "jnp.argsort(touched)"),
        ("_changed.step", "to_host(block[None]), i, 0", "to_host(block[None]), n, 0"),
        ("_block", "blocks, i, 0", "blocks, 0 * i, 0", "test_host_caches.py::test_verbs"),
        (
            "_put.change",
            "jnp.where(jnp.any(here, axis=1)[:, None, None, None], found, block)",
            "found",
            "test_host_caches.py::test_whole_blocks_of_single_rows",
        ),
        (
            "_put.change",
            "jnp.argmax(here, axis=1)",
            "jnp.argmin(here, axis=1)",
            "test_host_caches.py::test_whole_blocks_of_single_rows",
        ),
        ("HostLayout.from_blocks", "to_device(blocks)", "blocks", "test_host_caches.py::test_dense_is_on_the_device"),
        ("HostLayout.best", "min(num_slots, BLOCK_TOKENS)", "num_slots", "test_host_caches.py::test_blocks_on_devices"),
    ),
    *group(
        "attend/xla.py",
        "test_host_caches.py::test_a_block_is_fetched_once_while_the_one_before_is_computed",
        ("_Walk.over_blocks", "jnp.maximum(self.last - 1, self.first)", "self.last"),
        ("_Walk.over_blocks.ahead", "fetch(i + 1)", "fetch(i)"),
        ("_Walk.over_blocks", "fetch(self.first))", "fetch(self.first + 1))"),
        (
            "_query_blocks",
            "HOST_SCORES // (batch * view.num_kv_heads * view.layout.rows)",
            "HOST_SCORES // (batch * view.num_kv_heads)",
            "test_host_caches.py::test_a_prompt_has_the_cache_come_over_once",
        ),
    ),
    *group(
        "attend/api.py",
        "test_host_caches.py::test_kernels_refuse_by_name",
        ("_refusal", "and not record.reads_host", "and record.reads_host"),
    ),
    *group(
        "cache/base.py",
        "test_host_caches.py::test_verbs\ntest_host_caches.py::test_arrays_elsewhere_are_brought_back",
        ("Cache.usable", "to_host(x) if on_host", "jnp.asarray(x) if on_host"),
    ),
    *group(
        "cache/axes.py",
        "test_host_caches.py::test_verbs",
        ("along.one", "axis - 1", "axis"),
    ),
    *group(
        "cache/kv_cache.py",
        """
        test_verbs.py::test_select
        test_verbs.py::test_select_of_unknown_rows_takes_no_record_along
        test_verbs.py::test_cross_attention
        """,
        ("_selected", "cache, cache.axes)", "cache, cache.axes).replace(values=cache.values)"),
        (
            "_selected",
            "jnp.where(known, cache.lengths, 0)",
            "cache.lengths",
            "test_verbs.py::test_select_out_of_range_under_jit",
        ),
        (
            "_selected",
            "cache.forgotten(~known, cache.state)",
            "cache.state",
            "test_verbs.py::test_a_row_that_is_not_there_has_the_state_of_an_empty_one",
        ),
        (
            "KVCache.from_encoder",
            "jnp.where(t < lengths[:, None], t, NOWHERE)",
            "jnp.where(t <= lengths[:, None], t, NOWHERE)",
            "test_blocks.py::test_pads_of_an_encoder_are_not_encoded",
        ),
        (
            "KVCache.from_encoder",
            "lengths = jnp.where(bad, 0, lengths)",
            "lengths = lengths + 0",
            "test_verbs.py::test_bad_encoder_lengths_under_jit",
        ),
        (
            "_layout",
            "rows=codec.rows or layout.rows",
            "rows=layout.rows",
            "test_codecs.py::test_kivi_at_and_around_whole_residuals",
        ),
    ),
    *group(
        "cache/base.py",
        """
        test_verbs.py::test_trim
        test_verbs.py::test_reset
        test_verbs.py::test_select_refuses
        test_meanings.py::test_overflow
        """,
        ("Cache.trim", "lengths=self.lengths - num_tokens", "lengths=self.lengths - num_tokens - (num_tokens > 0)"),
        (
            "Cache.trim",
            "jnp.where(in_range & there, num_tokens, 0)",
            "jnp.where(in_range, num_tokens, 0)",
            "test_policies.py::test_trim_needs_what_has_left",
        ),
        (
            "Cache.trim",
            "there = there & encoded",
            "there = there | encoded",
            "test_codecs.py::test_trim_asks_the_codec_too",
        ),
        (
            "Cache.reset",
            "jnp.where(rows, 0, self.status)",
            "self.status",
            "test_verbs.py::test_reset_clears_the_record",
        ),
        (
            "Cache.forgotten",
            "jnp.where(rows.reshape",
            "jnp.where(~rows.reshape",
            "test_verbs.py::test_a_row_that_is_not_there_has_the_state_of_an_empty_one",
        ),
        ("Cache.unfit", "x & stored", "x | stored", "test_codecs.py::test_values_that_are_not_finite"),
        (
            "Cache.unfit",
            "rows |= jnp.any(x & stored, axis=(1, 2))",
            "rows = jnp.any(x & stored, axis=(1, 2))",
            "test_sharding.py::test_a_token_that_cannot_be_encoded_is_marked_once",
        ),
        ("Cache.advance", "bits.mark(self.status, too_many, bits.OVERFLOW)", "self.status"),
        (
            "known_rows",
            "rows < batch_size)",
            "rows <= batch_size)",
            "test_verbs.py::test_select_out_of_range_under_jit",
        ),
        (
            "nbytes_of",
            "-(-int(np.prod(leaf.shape)) * width // 8)",
            "int(np.prod(leaf.shape)) * leaf.dtype.itemsize",
            "test_blocks.py::test_bytes_of_narrow_types",
        ),
    ),
    *group(
        "cache/view.py",
        "test_meanings.py::test_policy_suite",
        ("block_positions", "fill=-1", "fill=0", "test_blocks.py::test_blocks_of_queries"),
        (
            "token_view",
            "counts=jnp.sum(positions >= 0",
            "counts=jnp.sum(positions > 0",
            "",
            "only KIVI reads counts, and no chunk is stored by it",
        ),
        (
            "View.value_block",
            '"values", i',
            '"keys", i',
            "test_codecs.py::test_kivi_reads_the_residual_where_nothing_is_encoded",
        ),
        (
            "View.dense",
            "codec.dense(self.values, store",
            "codec.dense(self.keys, store",
            "test_blocks.py::test_a_pool_of_40000_pages",
        ),
    ),
    *group(
        "cache/status.py",
        "test_verbs.py::test_trim_out_of_range_under_jit\ntest_meanings.py::test_overflow",
        ("mark", "status | bit", "status", "test_meanings.py::test_overflow"),
        (
            "raise_for",
            "np.nonzero(status & bit)",
            "np.nonzero(status == bit)",
            "test_blocks.py::test_a_row_with_two_records",
        ),
    ),
    # Codecs ------------------------------------------------------------------------------------------------------
    *group(
        "codecs/kivi.py",
        """
        test_codecs.py::test_kivi_at_and_around_whole_residuals
        test_codecs.py::test_kivi_reads_codes_and_what_came_last
        test_codecs.py::test_kivi_keeps_the_last_of_a_long_chunk
        test_codecs.py::test_what_lies_in_unused_slots_never_matters
        test_codecs.py::test_attention_is_attention_over_the_decoded_cache
        test_codecs.py::test_kivi_replay
        """,
        ("KIVI.block", "counts // self.residual * self.residual", "(counts - 1) // self.residual * self.residual"),
        ("KIVI.block", "counts - self.residual", "counts - self.residual - 1"),
        (
            "KIVI.block",
            "position < counts",
            "position <= counts",
            "test_codecs.py::test_kivi_reads_the_residual_where_nothing_is_encoded",
        ),
        ("KIVI.write", "t >= count[:, None] - self.residual", "t > count[:, None] - self.residual"),
        ("KIVI._append_keys", "(start + count) // size", "(start + count - 1) // size"),
        ("KIVI._append_keys", "position < start[:, None]", "position <= start[:, None]"),
        ("KIVI._append_keys", "index < end[:, None], index, layout.num_blocks", "index < end[:, None], index, 0"),
        ("KIVI._append_values", "start[:, None] - size + t", "start[:, None] - size + t + 1"),
        ("KIVI._append_values", "leaving >= 0", "leaving > 0"),
        (
            "KIVI.mix",
            "coded = filled & ~exact",
            "coded = filled | exact",
            "test_codecs.py::test_kivi_reads_codes_and_what_came_last",
        ),
        ("KIVI.scores", "jnp.where(exact, raw, coded)", "jnp.where(exact, coded, raw)"),
        (
            "KIVI.can_trim",
            "lengths < self.residual",
            "lengths <= self.residual",
            "test_codecs.py::test_trim_asks_the_codec_too",
        ),
    ),
    *group(
        "codecs/int4.py",
        """
        test_codecs.py::test_products_are_those_of_the_decoded_tokens
        test_codecs.py::test_what_lies_in_unused_slots_never_matters
        """,
        ("Int4.mix", "jnp.where(filled[:, :, None], values[n], jnp.uint16(0))", "values[n]"),
        ("Int4.mix", 'values["data"], scale, minimum', 'values["data"], minimum, scale'),
    ),
    *group(
        "codecs/grouped.py",
        """
        test_codecs.py::test_scales_and_minima_cover_the_group
        test_codecs.py::test_round_trip
        test_codecs.py::test_packing
        test_codecs.py::test_products_are_those_of_the_decoded_tokens
        test_codecs.py::test_any_magnitude_stays_finite_and_within_the_bound
        """,
        ("quantise", "top = 2**bits - 1", "top = 2**bits"),
        (
            "quantise",
            "jnp.where(finite, jnp.min",
            "jnp.where(finite | True, jnp.min",
            "test_codecs.py::test_not_finite_among_many_heads",
        ),
        ("quantise", 'mode="edge"', 'mode="constant"'),
        ("pack_pair", "_round(low, dtype, -1)", "_round(low, dtype, 1)"),
        ("pack_pair", "jnp.maximum(step, 0), dtype, 1", "jnp.maximum(step, 0), dtype, -1"),
        ("pack_pair", "largest > LARGE", "largest > 1e9"),
        (
            "pack_pair",
            "jnp.where(finite, scale, jnp.uint16(_NAN))",
            "scale",
            "test_codecs.py::test_values_that_are_not_finite",
            "the minimum of a group that is not finite is NaN too, and so is every number of the group",
        ),
        ("scores", "mean * low[:, :, group, None]", "mean * low[:, :, 0, None]"),
        ("mix", "weights = probs * step[:, :, group, None]", "weights = probs * step[:, :, 0, None]"),
        ("mix", "group = min(group, last)", "group = group % (last + 1)", "", "what lies behind H means nothing"),
        ("plane", "2**bits - 1", "2 ** (bits - 1) - 1"),
    ),
    *group(
        "codecs/scaled.py",
        """
        test_codecs.py::test_products_are_those_of_the_decoded_tokens
        test_codecs.py::test_any_magnitude_stays_finite_and_within_the_bound
        test_codecs.py::test_values_that_are_not_finite
        """,
        ("mix_scaled", 'jnp.where(filled[:, :, None], values["scale"], 0)', 'values["scale"]'),
        (
            "mix_scaled",
            "data = jnp.where(filled[..., None], data, 0)",
            "data = data + 0",
            "test_codecs.py::test_unused_float8_is_not_read_whatever_its_bits",
        ),
        ("scale_of", "jnp.where(largest <= np.finfo(np.float32).max, scale, np.float32(np.nan))", "scale"),
    ),
    *group(
        "codecs/int8.py",
        """
        test_codecs.py::test_int8_is_symmetric_and_rounds_half_to_even
        test_codecs.py::test_products_are_those_of_the_decoded_tokens
        """,
        ("Int8.encode", "jnp.round(x * reciprocal(scale))", "jnp.floor(x * reciprocal(scale))"),
        ("integer_product", "rest - digits[-1]) * 254", "rest - digits[-1]) * 255"),
        ("Int8.scores", '* keys["scale"]', "* 1.0"),
    ),
    *group(
        "codecs/float8.py",
        """
        test_codecs.py::test_float8_bits_are_widened_exactly
        test_codecs.py::test_float8_saturates
        test_codecs.py::test_products_are_those_of_the_decoded_tokens
        """,
        ("Float8.encode", "jnp.clip(x * reciprocal(scale), -TOP, TOP)", "x * reciprocal(scale)"),
        ("widen", "magnitude < 8", "magnitude < 7"),
        ("widen", "2.0**-6", "2.0**-7"),
    ),
    *group(
        "codecs/plain.py",
        """
        test_meanings.py::test_codec_suite
        test_meanings.py::test_scores_beyond_the_storage_dtype
        test_meanings.py::test_accuracy
        """,
        ("Plain.mix", 'jnp.where(filled[..., None], values["data"], 0)', 'values["data"]'),
        ("product", "preferred_element_type=acc", "preferred_element_type=wide"),
        ("widen_float16", "exponent == 31", "exponent == 32", "test_codecs.py::test_float16_bits_are_widened_exactly"),
    ),
    # Policies ----------------------------------------------------------------------------------------------------
    *group(
        "policies/fastgen.py",
        """
        test_policies.py::test_fastgen_rounds_shares_down
        test_policies.py::test_fastgen_without_special_tokens_skips_their_way
        test_policies.py::test_fastgen_keeps_all_of_a_row_that_starts_with_one_token
        test_policies.py::test_fastgen_takes_every_way
        test_policies.py::test_fastgen_chooses_and_keeps_what_brute_force_does
        """,
        ("FastGen._share", " + 1e-4", ""),
        (
            "FastGen._choose",
            "share(common, scores - near) + share(there, near)",
            "share(common, scores) + share(there, near)",
        ),
        ("FastGen._choose", "kept >= self.recovery", "kept > 1.1 * self.recovery"),
        ("FastGen._choose", "(prompt == 1)[:, None]", "(prompt == 0)[:, None]"),
        (
            "FastGen._choose",
            "if self.special_tokens else jnp.full_like(scores[..., 0], -1)",
            "if True else jnp.full_like(scores[..., 0], -1)",
            "test_policies.py::test_fastgen_without_special_tokens_skips_their_way",
            "without special tokens their way keeps nothing, so no recovery above 0 is reached",
        ),
        ("FastGen._bound", "positions > (step.last", "positions >= (step.last"),
        ("FastGen._bound", "kinds < 2, kinds < 1", "kinds < 1, kinds < 2"),
        ("FastGen.measure", "kv_positions[:, :, None, :] > (", "kv_positions[:, :, None, :] >= ("),
        (
            "FastGen._kinds",
            "(1, self.punctuation_tokens), (2, self.special_tokens)",
            "(2, self.punctuation_tokens), (1, self.special_tokens)",
        ),
    ),
    *group(
        "policies/h2o.py",
        """
        test_policies.py::test_h2o_by_places_where_keys_are_rotated
        test_policies.py::test_h2o_keeps_what_brute_force_keeps
        """,
        ("H2O.observe", "step.last - self.num_recent", "step.last + 1 - self.num_recent"),
        ("H2O.observe", "scored.close_up(before, leaves)", "before"),
        (
            "H2O.observe",
            "jnp.where(leaves, 0, scores)",
            "scores",
            "",
            "a token that enters starts without a score again",
        ),
        ("H2O.absorb", "step.last - self.num_recent", "step.last + 1 - self.num_recent"),
        ("H2O.absorb", "scored.cache_positions(positions)", "state.cache_positions"),
        (
            "H2O.absorb",
            "<= self.budget",
            "< self.budget",
            "test_policies.py::test_h2o_keeps_what_brute_force_keeps",
            "with as many tokens as the budget, the recent and the best of the others are all of them",
        ),
    ),
    *group(
        "policies/scissorhands.py",
        """
        test_policies.py::test_scissorhands_alone
        test_policies.py::test_scissorhands_by_places_in_the_cache
        test_policies.py::test_scissorhands_keeps_what_brute_force_keeps
        test_policies.py::test_of_equal_scores_the_lowest_position_leaves
        """,
        ("Scissorhands.observe", "count.astype(mass.dtype) >= 1)", "count.astype(mass.dtype) > 1.2)"),
        ("Scissorhands.observe", "over = count > self.budget", "over = count >= self.budget"),
        ("Scissorhands.observe", "(old & ~bit) |", "old |"),
        ("Scissorhands.measure", "lengths[:, None] + 1)", "lengths[:, None])"),
        ("Scissorhands.absorb", "> self.budget, keep, there", "> self.budget + 1, keep, there"),
        ("Scissorhands.absorb", "scored.cache_positions(positions)", "state.cache_positions"),
        ("Scissorhands._survivors", "step.last - self.num_protected", "step.last - self.num_protected + 1"),
        ("Scissorhands._record", "(low & ~over_written) |", "low |"),
        (
            "Scissorhands._counts",
            "count + bits(byte)",
            "jnp.maximum(count, bits(byte))",
            "test_policies.py::test_counts_of_records",
        ),
    ),
    *group(
        "policies/scored.py",
        """
        test_policies.py::test_of_equal_scores_the_lowest_position_leaves
        test_policies.py::test_exactly_one_leaves
        test_policies.py::test_scissorhands_alone
        test_policies.py::test_h2o_by_places_where_keys_are_rotated
        test_policies.py::test_h2o_keeps_what_brute_force_keeps
        """,
        ("_earlier", "one[1] <= other[1]", "one[1] >= other[1]"),
        ("first", "jnp.where(jnp.isnan(scores), -jnp.inf", "jnp.where(jnp.isnan(scores), jnp.inf"),
        ("best", "jnp.where(candidates, positions, EMPTY)", "jnp.where(candidates, -positions, EMPTY)"),
        ("settle", "jnp.argsort(stays, axis=-1, stable=True)", "jnp.argsort(~stays, axis=-1, stable=True)"),
        (
            "close_up",
            "before > gap, before - 1",
            "before >= gap, before - 1",
            "",
            "only the token that leaves stands at the gap",
        ),
        ("enter_last", "axis=-1) + 1", "axis=-1)"),
        ("ScoredPolicy.enter", "enter_last(state.cache_positions, slots)", "state.cache_positions"),
        (
            "BudgetPolicy.num_slots",
            "return self.budget + 1",
            "return self.budget + 2",
            "test_policies.py::test_one_leaves_whatever_the_compiler_does",
        ),
        (
            "added",
            "scores + mass, scores",
            "scores, scores",
            "test_policies.py::test_fastgen_chooses_and_keeps_what_brute_force_does",
        ),
    ),
    *group(
        "policies/streaming.py",
        """
        test_policies.py::test_streaming_says_where_each_token_lies
        test_policies.py::test_streaming_within_a_window_of_the_call
        test_policies.py::test_streaming_sees_positions_in_the_cache
        test_smaller_caches.py::test_smaller_caches
        """,
        ("StreamingLLM.sink_positions", "num_sinks + window - 1", "num_sinks + window"),
        ("StreamingLLM.place", "step.last - window", "step.last + 1 - window"),
        ("StreamingLLM.positions", "slot <= last, slot, EMPTY", "slot < last, slot, EMPTY"),
        (
            "StreamingLLM.can_trim",
            "lengths <= num_slots",
            "lengths >= 0",
            "test_policies.py::test_trim_needs_what_has_left",
        ),
    ),
    *group(
        "policies/window.py",
        """
        test_meanings.py::test_ring_wraps_at_every_phase
        test_verbs.py::test_trim_ring_after_it_wrapped
        """,
        ("SlidingWindow.place", "step.last - step.num_slots", "step.last + 1 - step.num_slots"),
        ("SlidingWindow.positions", "position >= 0", "position > 0"),
        ("SlidingWindow.kept", "jnp.minimum(lengths, num_slots)", "lengths", "test_meanings.py::test_policy_suite"),
        (
            "SlidingWindow.can_trim",
            "lengths <= num_slots",
            "lengths < num_slots",
            "test_verbs.py::test_trim_ring_before_it_wraps",
        ),
    ),
    *group(
        "policies/base.py",
        "test_verbs.py::test_trim\ntest_meanings.py::test_overflow",
        ("Policy.fits", "<= most", "< most"),
        ("Policy.positions", "slot < lengths[:, None]", "slot <= lengths[:, None]"),
        (
            "Policy.__init_subclass__",
            '"positions", ',
            "",
            "test_blocks.py::test_any_order_of_its_own_is_refused",
        ),
    ),
    # Attention ---------------------------------------------------------------------------------------------------
    *group(
        "masks.py",
        "test_meanings.py::test_mask_rule",
        ("Mask.between", "kv > first - self.window", "kv >= first - self.window"),
        (
            "Mask.between",
            "kv > first - self.reach",
            "kv >= first - self.reach",
            "test_policies.py::test_a_window_of_the_call_bounds_sinks_too",
        ),
        (
            "Mask.between",
            "kv < self.end",
            "kv <= self.end",
            "test_policies.py::test_streaming_within_a_window_of_the_call",
        ),
        (
            "Mask.reachable",
            "jnp.max(jnp.where(real, q_positions, EMPTY)",
            "jnp.min(jnp.where(real, q_positions, EMPTY)",
        ),
        (
            "Mask.narrowed",
            "window <= self.window",
            "window < self.window",
            "",
            "of two equal windows either hides the same: all but the last tokens, sinks too",
        ),
        (
            "Mask.narrowed",
            "reach=window) if self.num_sinks",
            "reach=window + 1) if self.num_sinks",
            "test_policies.py::test_streaming_within_a_window_of_the_call",
        ),
    ),
    *group(
        "attend/request.py",
        "test_blocks.py::test_blocks_of_queries\ntest_meanings.py::test_logsumexp",
        (
            "adjust",
            "kv_positions[:, :, None, None, :]",
            "(kv_positions[:, :, None, None, :] + 1)",
        ),
        ("ungrouped", "(0, 3, 1, 2,", "(0, 3, 2, 1,"),
        (
            "rotated",
            "jnp.maximum(kv_positions, 0)",
            "jnp.maximum(kv_positions - 1, 0)",
            "test_policies.py::test_h2o_by_places_where_keys_are_rotated",
        ),
    ),
    *group(
        "attend/step.py",
        """
        test_shared_caches.py::test_what_a_reader_attends_to
        test_shared_caches.py::test_a_budget_is_read_once_the_owner_has_let_go
        test_shared_caches.py::test_pages_that_a_window_has_left
        test_shared_caches.py::test_pages_that_rows_share
        """,
        ("read", "before=new.num_new", "before=new.num_new * 0"),
        ("read", "lengths=cache.lengths - new.num_new", "lengths=cache.lengths"),
        ("read", "held=new.length > 1", "held=False"),
        ("read", "bits.mark(cache.status, new.refused, bits.LOST)", "cache.status"),
        ("beside", "jnp.zeros_like(new.num_new)", "new.num_new"),
        (
            "needing_pages",
            "new.key is not None and new.stays",
            "True",
            "test_shared_caches.py::test_pages_that_are_not_there",
        ),
        (
            "needing_pages",
            "new.key is None and cache.policy.in_order",
            "False",
            "test_shared_caches.py::test_pages_that_a_window_has_left",
        ),
    ),
    *group(
        "policies/window.py",
        "test_shared_caches.py::test_what_a_reader_attends_to",
        ("SlidingWindow.can_read", "> step.last - step.num_slots", "> step.last - step.num_slots - 1"),
        ("SlidingWindow.can_read", "> step.last - step.num_slots", "> step.last - step.num_slots + 1"),
    ),
    *group(
        "policies/chunked.py",
        "test_shared_caches.py::test_what_can_be_read",
        ("Chunked.can_read", ">= self._start(step.last)", "> self._start(step.last)"),
        ("Chunked.can_read", "| (mask.first_seen(step.lengths) >= self._start(step.last))", "| True"),
    ),
    *group(
        "policies/streaming.py",
        "test_shared_caches.py::test_what_can_be_read",
        ("StreamingLLM.can_read", "first > step.last - window", "first >= step.last - window"),
    ),
    *group(
        "policies/base.py",
        "test_shared_caches.py::test_what_can_be_read_of_a_budget",
        ("Policy.can_read", "step.num_new <= 1", "step.num_new <= 2"),
    ),
    *group(
        "attend/step.py",
        """
        test_policies.py::test_streaming_within_a_window_of_the_call
        test_policies.py::test_h2o_by_places_where_keys_are_rotated
        test_meanings.py::test_overflow
        test_meanings.py::test_left_padding
        """,
        ("_requests", "mask.reach if mask.num_sinks else mask.window", "None"),
        ("_requests", "begin=num_sinks, num_sinks=0", "num_sinks=0"),
        ("_located", "jnp.where(is_real, positions, EMPTY)", "jnp.where(is_real, seen_at, EMPTY)"),
        ("_located", "first - _gone(cache)", "first"),
        ("_located", "and step.rules.key_rope is None", ""),
        ("cross", "t < new.num_new[:, None]", "t <= new.num_new[:, None]", "test_verbs.py::test_cross_attention"),
        ("cross", "Mask(causal=False)", "Mask()", "test_verbs.py::test_cross_attention"),
        ("_gone", "cache.lengths - 1 - jnp.max", "cache.lengths - jnp.max"),
        (
            "_scorable",
            "jnp.any(jnp.isnan(lse), axis=(1, 2))",
            "jnp.all(jnp.isnan(lse), axis=(1, 2))",
            "test_policies.py::test_attention_that_is_nan",
        ),
        (
            "_measured.original",
            "positions + gone.reshape",
            "positions - gone.reshape",
            "test_policies.py::test_policies_are_told_true_positions",
        ),
        (
            "_measured.original",
            "positions < 0",
            "positions < -1",
            "test_policies.py::test_policies_are_told_true_positions",
        ),
        (
            "_own_view",
            "min(layout.rows, CHUNK_ROWS)",
            "max(layout.rows, CHUNK_ROWS)",
            "",
            "blocks of another length, the same numbers",
        ),
    ),
    *group(
        "attend/together.py",
        """
        test_shared_prefix.py::test_what_is_not_read_changes_no_bit_and_neighbours_do_not_meet
        test_shared_prefix.py::test_random_groups_and_levels
        test_shared_prefix.py::test_a_row_is_read_by_whoever_is_left
        test_shared_prefix.py::test_blocks_are_visited_once_for_all
        """,
        (
            "parted",
            "lengths=cache.lengths + num_new",
            "lengths=cache.lengths",
            "test_policies.py::test_output_is_attention_over_the_kept_tokens",
        ),
        (
            "parted",
            "end <= full[at]",
            "end <= full[at] + 1",
            "",
            "of a page that a row fills by half, causality hides the rest: slots are in order of positions",
        ),
        (
            "parted",
            "(first[at] == begin)",
            "(first[at] >= begin)",
            "",
            "plans whose spans overlap are refused before, and what a row lost since leaves a gap, no overlap",
        ),
        ("parted", "at[:, 0]", "at[:, -1]"),
        ("parted", "table, first, jnp", "table, first + 1, jnp"),
        ("parted", "after.lengths - first", "after.lengths"),
        ("Spans.positions", "taken - self.first[:, None, None]", "taken", "test_shared_prefix.py::test_rules"),
        ("Spans.by_row", "rows(lse), -jnp.inf", "rows(lse), 0"),
        ("Spans.by_row", "jnp.full((self.batch,), count", "jnp.full((self.batch,), 0"),
        (
            "Parted.slots",
            "slots - self.first[:, None]",
            "slots",
            "test_shared_prefix.py::test_what_is_left_of_a_row_is_counted_from_its_first_token",
        ),
        ("Parted.positions", "positions - self.first[:, None]", "positions", "test_shared_prefix.py::test_rules"),
    ),
    *group(
        "cache/shared.py",
        "test_shared_prefix.py::test_rows",
        ("_fitting", "times[at] > 1", "times[at] > 2"),
        ("_fitting", "begin != begun[at]", "begin < begun[at]"),
        ("_fitting", "end > full[at]", "end > full[at] + 1"),
        ("_fitting", "needed[at] & (table", "~needed[at] & (table"),
        (
            "_fitting",
            "jnp.where(stays, members, NOBODY)",
            "members",
            "test_shared_prefix.py::test_a_span_of_other_pages_is_taken_apart",
        ),
    ),
    *group(
        "cache/paged.py",
        "test_shared_prefix.py::test_a_row_is_read_by_whoever_is_left",
        ("_selected", "cleared(cache.shared)", "cache.shared"),
    ),
    *group(
        "sharding/attention.py",
        "test_shared_prefix.py::test_on_a_mesh",
        ("cached_attention", "cache = cache.replace(shared=None)", "pass"),
    ),
    *group(
        "serving/sharing.py",
        """
        test_shared_prefix.py::test_what_is_worth_it
        test_shared_prefix.py::test_what_is_found_is_there_and_saves_reads
        """,
        ("_keys", "column >= full[:, None]", "column > full[:, None]"),
        ("_Tree._level", "first < b and a < last", "first < b and a > last"),
        ("_Tree._close", "open_to[j] = False", "pass"),
        ("_saved", "(rows - spans) * length", "rows * length"),
        ("shared_prefixes", "np.maximum(unseen, gone)", "gone"),
        ("_arrays", "(gone[row], row)", "-row", "test_shared_prefix.py::test_windows_that_have_given_pages_back"),
    ),
    *group(
        "attend/prepare.py",
        "test_bad_input.py\ntest_meanings.py::test_overflow",
        (
            "_fits",
            "cache.lengths <= _checks.INT32_MAX - num_new",
            "cache.lengths >= 0",
            "test_verbs.py::test_positions_end_where_int32_does",
        ),
        ("prepared", "num_new=jnp.where(fits, new.num_new, 0), refused", "refused"),
        (
            "_may_come_first",
            "policy.mask() == Mask()",
            "True",
            "test_policies.py::test_a_few_tokens_at_a_time",
        ),
        ("_may_come_first", "cache.codec.rows is None", "True", "test_policies.py::test_a_few_tokens_at_a_time"),
        ("_real_tokens", "jnp.where(bad, 0, given)", "given"),
    ),
    *group(
        "attend/rules.py",
        "test_arrays.py",
        ("Rules.checked", "1 / math.sqrt(query.shape[-1])", "1 / query.shape[-1]"),
    ),
    *group(
        "pallas/on_arrays.py",
        "test_arrays.py",
        ("_attend", "view.layout.num_slots - 1, jnp.int32)", "view.layout.num_slots, jnp.int32)"),
        ("decode_attention", 'else {"scale": v_scales[None', 'else {"scale": k_scales[None'),
        ("paged_decode_attention", 'else {"scale": v_scales[:, :, None]}', 'else {"scale": k_scales[:, :, None]}'),
        ("decode_attention", "_starts(starts, batch)", "_starts(starts, batch) + 1"),
        ("_positions", "slot + slots - lengths", "slot"),
        ("_positions", "slot < lengths,", "slot <= lengths,"),
        ("_Pair.mix", "self.of_values.mix", "self.of_keys.mix", "test_compat.py::test_pages_of_two_dtypes"),
        (
            "paged_decode_attention",
            "jnp.where(jnp.any(unknown, axis=1)[:, None, None], EMPTY, positions)",
            "positions",
            "test_gpu_kernels.py::test_a_page_that_is_not_there",
        ),
    ),
    *group(
        "attend/xla.py",
        """
        test_blocks.py::test_blocks_of_queries
        test_meanings.py::test_logsumexp
        test_policies.py::test_h2o_keeps_what_brute_force_keeps
        """,
        ("attend", "request.positions, -1)", "request.positions)"),
        ("attend", "jnp.sum(mass, axis=0)", "mass[0]"),
        ("_query_block", "total * keep + jnp.sum(weights, axis=-1)", "total + jnp.sum(weights, axis=-1)"),
        ("_query_block", "jnp.log(total) + top", "jnp.log(total) - top"),
        (
            "measure",
            "by_block(lse, jnp.inf)",
            "by_block(lse)",
            "test_blocks.py::test_blocks_of_queries",
            "queries that fill a block are pads: their scores are -inf against any sum",
        ),
        ("measure", "jnp.mean(probs, axis=2", "jnp.sum(probs, axis=2"),
    ),
    *group(
        "attend/state.py",
        "test_verbs.py::test_merge_is_attention_over_the_union\ntest_verbs.py::test_merge_with_nothing\ntest_meanings.py::test_rules_of_a_call",
        (
            "merge_states",
            "jnp.maximum(lse_a, lse_b)",
            "jnp.minimum(lse_a, lse_b)",
            "test_verbs.py::test_merge_far_apart_and_dtypes",
        ),
        ("_weighted", "jnp.where(weight == 0, 0, out.astype(acc))", "out.astype(acc)"),
    ),
    *group(
        "attend/reference.py",
        "test_meanings.py::test_logsumexp\ntest_meanings.py::test_empty_rows\ntest_policies.py::test_h2o_by_the_reference",
        ("attend", "jnp.log(jnp.where(empty, 1, total)) + top", "jnp.log(jnp.where(empty, 1, total)) - top"),
        ("attend", "jnp.sum(jnp.mean(probs, axis=2), axis=2)", "jnp.sum(jnp.max(probs, axis=2), axis=2)"),
        (
            "attend",
            "jnp.where(reached, values, 0)",
            "values",
            "test_meanings.py::test_a_page_that_a_window_has_left_may_be_anothers",
        ),
    ),
    # Kernels -----------------------------------------------------------------------------------------------------
    *group(
        "pallas/tiles.py",
        """
        test_blocks.py::test_which_tiles_are_needed_and_which_are_full
        test_blocks.py::test_a_pool_of_40000_pages
        test_tpu_kernels.py::test_only_tiles_that_hold_something_are_read
        """,
        ("near_and_filled", "cut(request.reached(positions))", "cut(request.reached(positions))[..., :-1]"),
        ("near_and_filled", "cut(positions >= 0)", "cut(positions >= 0)[..., :-1]"),
        (
            "near_and_filled",
            "jnp.all(cut(positions >= 0), axis=(1, 3))",
            "jnp.all(cut(positions >= 0), axis=3).any(axis=1)",
        ),
        ("pages_of", "jnp.take(page.reshape", "jnp.take(page.astype(jnp.int16).astype(jnp.int32).reshape"),
    ),
    *group(
        "pallas/tiles.py",
        "test_blocks.py::test_the_list_of_tiles_and_their_pages",
        ("_listed", "ends[None] <= entry", "ends[None] < entry"),
        ("_listed", "of_row[:, :tiles] <= number", "of_row[:, :tiles] < number"),
        ("_listed", "of_row[:, tiles : 2 * tiles]", "of_row[:, :tiles]"),
        ("_listed", "entry - of_row[:, -1]", "entry"),
        ("pages_of", "table < num_pages", "table <= num_pages"),
        ("pages_of", "table >= 0", "True"),
        ("pages_of", "jnp.where(holds, ", "jnp.where(holds | True, "),
        ("pages_of", "chosen.row * tiles + chosen.tile", "chosen.row + chosen.tile"),
        ("pages_of", "[:, : holds.shape[1]]", "[:, -holds.shape[1] :]"),
    ),
    *group(
        "pallas/shares.py",
        "test_gpu_kernels.py::test_work_is_shared_out_evenly\ntest_gpu_kernels.py::test_a_window_costs_a_window",
        ("survey", "hole + end - after", "hole + end - after - (end > 1)"),
        ("Counts.__init__", "programs), least)", "programs), 1)"),
        ("Counts.before", "self.index < row", "self.index <= row"),
        (
            "in_order",
            "first - (mask.window - 1)",
            "last - (mask.window - 1)",
            "test_gpu_kernels.py::test_rows_in_order_need_not_be_looked_at",
        ),
        (
            "in_order",
            "lax.div(near, tile), hole), end)",
            "lax.div(near, tile), 0), end)",
            "test_gpu_kernels.py::test_rows_in_order_need_not_be_looked_at",
        ),
        (
            "in_order",
            "whole_end = lax.div(end, tile)",
            "whole_end = lax.div(end + 1, tile)",
            "test_gpu_kernels.py::test_rows_in_order_need_not_be_looked_at",
        ),
    ),
    *group(
        "pallas/gpu_walk.py",
        "test_gpu_kernels.py::test_work_is_shared_out_evenly",
        ("tile_of", "jnp.where(j < hole", "jnp.where(j <= hole", "test_gpu_kernels.py::test_a_window_costs_a_window"),
        ("Segment.is_last", "self.end == self.rows.count", "self.end <= self.rows.count"),
        ("Walk.at", "segment == self.start", "segment != self.start"),
        ("Walk.at", "segment == self.last", "segment > self.last"),
        ("Walk.after.is_empty", "here.end <= here.first", "here.end < here.first"),
    ),
    *group(
        "pallas/gpu_fetch.py",
        "test_gpu_kernels.py::test_several",
        (
            "Fetcher._copy_queries",
            'memory["slopes"].at[head]',
            'memory["slopes"].at[0]',
            "test_gpu_kernels.py::test_mass_and_slopes_of_one_token",
        ),
        ("Fetcher._pages", "lax.div(start + n * size, size)", "lax.div(start, size)"),
        (
            "Fetcher._copy_tile",
            "lax.rem(start, size), part)",
            "lax.rem(start, size) * 0, part)",
            "test_gpu_kernels.py::test_values",
        ),
    ),
    *group(
        "pallas/shares.py",
        "test_gpu_kernels.py::test_rings_need_not_be_looked_at",
        ("turned", "count - ring", "count - ring + 1"),
        ("turned", "at - (mask.window - 1)", "at - mask.window"),
        ("turned", "wraps, rest = end > ring", "wraps, rest = end > ring + 64"),
        ("turned", "begin_tile, hole), behind", "begin_tile, 0), behind"),
        ("turned", "whole, whole_end = up(begin)", "whole, whole_end = lax.div(begin, tile)"),
        ("turned", "every = number == ring", "every = number >= ring - 1"),
        ("position_in_ring", "slot < turn", "slot <= turn"),
        ("position_in_ring", "jnp.where(slot < ring", "jnp.where(slot <= ring"),
        ("reckoned", "if ring else", "if ring < 0 else", "test_gpu_kernels.py::test_a_ring"),
    ),
    *group(
        "pallas/gpu_append.py",
        """
        test_gpu_append.py::test_what_xla_writes
        test_gpu_append.py::test_pages_that_are_not_there
        test_gpu_append.py::test_small_tables
        test_gpu_append.py::test_steps_are_those_without_it
        """,
        ("admitted", "given > 1", "given > 2"),
        ("admitted", "jnp.where(bad_count, 0, given)", "given"),
        ("admitted", "jnp.where(length >= slots, slots, length + count)", "length + count"),
        ("admitted", "count = jnp.where(unknown, 0, count)", "pass"),
        ("admitted", "length <= spec.most - count", "length < spec.most - count"),
        ("admitted", "if spec.turns else lax.min", "if not spec.turns else lax.min"),
        ("admitted", "if spec.turns else spec.first", "if True else spec.first"),
        ("admitted", "bits.OVERFLOW: jnp.logical_not(fits)", "bits.OVERFLOW: fits"),
        ("Admitted.bits", "status | bit", "status * 0 | bit"),
        ("_outside", "page >= spec.pages", "page > spec.pages"),
        ("_outside", "count - size)", "count)"),
        ("_outside", "lane + (begin - start)", "lane + i * size"),
        ("_outside", "lax.div(end + (size - 1), size)", "lax.div(end, size)"),
        ("_outside", "range(spec.columns)", "range(1, spec.columns)"),
        ("_append_row", "row * spec.columns + column", "column"),
        ("_append_row", "lax.rem(slot, spec.page_size)", "slot * 0"),
        ("_append_row", "target[head, group, inside]", "target[head, group, 0]"),
        ("_append_row", 'plgpu.barrier_wait(shared["arrived"])', "pass"),
        ("_append_row", "one.real & unfit", "unfit"),
        ("_append_row", "jnp.where(one.real, length, EMPTY)", "length"),
        ("_append_row", "lax.min(one.length, jnp.int32(spec.slots))", "one.length"),
        ("append", '"v_new": new.value[:, 0]', '"v_new": new.key[:, 0]'),
    ),
    *group(
        "pallas/gpu_encode.py",
        "test_gpu_append.py::test_what_xla_writes",
        ("encoded", "jnp.where(size <= MOST, size, np.float32(np.inf))", "size"),
        ("encoded", "jnp.round(numbers)", "numbers"),
        ("_is_unfit", "head < codes.heads", "head < 0"),
        ("_is_unfit", "head < codes.heads", "head >= 0"),
        ("_nibbles", "found.astype(jnp.int32)", "found"),
        ("_nibbles", "first + codes.width, end", "first, end"),
        ("_nibbles", "of_group[first // size]", "of_group[0]"),
        ("uneven_cuts", "if c % COLUMNS_AT_ONCE", "if c < 0", "test_gpu_append.py::test_what_it_leaves_to_xla"),
    ),
    *group(
        "attend/at_once.py",
        """
        test_gpu_append.py::test_inside_shard_map
        test_gpu_append.py::test_derivatives_and_rows_mapped_over
        test_gpu_append.py::test_what_it_leaves_to_xla
        """,
        ("takes", "cache.policy.goes_by_length and", ""),
        ("takes", "new.length == 1 and", ""),
        ("_called", "return _mapped(append, tree)(*leaves)", "return append(*jax.tree.unflatten(tree, leaves))"),
    ),
    *group(
        "attend/step.py",
        "test_gpu_append.py::test_steps_are_those_without_it",
        ("_append_at_once", "jnp.ones_like(new.num_new)", "jnp.zeros_like(new.num_new)"),
        ("_append_at_once", "positions=appended.positions[:, None]", "positions=cache.lengths[:, None] - 1"),
    ),
    *group(
        "pallas/gpu_body.py",
        "test_gpu_kernels.py::test_several",
        ("compute", "[acc[0] * spread(keep, mixed.shape) + mixed]", "[acc[0] + mixed]"),
        (
            "compute",
            "kept = acc[0] * spread(keep, acc[0].shape)",
            "kept = acc[0]",
            "test_gpu_kernels.py::test_a_bad_value_reaches_those_who_may_attend_to_it",
        ),
        ("compute", "state = here.number + program", "state = here.number + 0 * program"),
    ),
    *group(
        "pallas/gpu_columns.py",
        "test_gpu_kernels.py::test_large_and_small_numbers_in_float16",
        ("power_of_two", "FLOAT16_EXPONENT - 1", "FLOAT16_EXPONENT + 9"),
        ("power_of_two", "exponent < 255", "exponent < 1"),
        (
            "prepare",
            "jnp.sum(part.astype(F32), axis=1)",
            "jnp.max(part.astype(F32), axis=1)",
            "test_gpu_kernels.py::test_several[groups of a token]",
        ),
    ),
    *group(
        "pallas/gpu_fragments.py",
        "test_gpu_fragments.py",
        ("operand", "0x6480", "0x6400"),
        ("operand", "0x80808080", "0x80808000"),
        ("nibbles", "0x0f0f0f0f", "0x0f0f0f1f"),
        ("nibbles", "0x4300 - bias", "0x4300 + bias"),
        ("_widened", "0x4140, 0x4342", "0x4342, 0x4140"),
        ("_widened", "bias | 0x8000", "bias"),
        ("_places", "2 * j + b", "j + 2 * b"),
        ("_places", "(i, j, w, b, *rest)", "(i, j, w, 1 - b, *rest)"),
        ("eight_bit_floats", "0x5c005c00", "0x58005800"),
        ("eight_bit_floats", "0x1404, 0x3424", "0x3424, 0x1404"),
        ("permuted_queries", "(i, j, 0, b, 0, 0, 0)", "(i, j, 0, 1 - b, 0, 0, 0)"),
        ("restored", "0, 0, 0, n, 0)", "0, 0, 0, 1 - n, 0)"),
        ("_permuted", "swapaxes(2, 3)", "swapaxes(2, 4)"),
    ),
    *group(
        "pallas/gpu_threads.py",
        "test_gpu_kernels.py::test_threads_wait_for_their_own_copies",
        ("ThreadFetcher.wait_for_tile", "self.spec.config.stages - 1", "self.spec.config.stages"),
        ("ThreadFetcher.wait_for_tile", "self.spec.config.stages - 1", "0"),
        ("ThreadFetcher.wait_for_tile", "wait_gmem_to_smem(0)", "wait_gmem_to_smem(1)"),
        (
            "ThreadFetcher._piece",
            "start + n * rows",
            "start",
            "test_gpu_kernels.py::test_values_by_mma[heads of 96-bfloat16-plain-0-bfloat16-1-Ampere]",
        ),
        ("refusal", "stream.tokens_last or copied", "True or copied", "test_gpu_kernels.py::test_ways_of_gpus"),
    ),
    *group(
        "pallas/gpu_mma.py",
        "test_gpu_kernels.py::test_values_by_mma[heads of 80-Int8-plain-0-bfloat16-1-Blackwell]",
        ("summed", "a[:, first : first + spec.cut]", "a[:, : min(spec.cut, b.shape[0] - first)]"),
    ),
    *group(
        "pallas/gpu_body.py",
        "test_gpu_kernels.py::test_values_by_mma[GQA-bfloat16-plain-0-bfloat16-1-Blackwell]",
        ("compute", 'spec.unit == "mma" and not spec.by_threads', "False"),
    ),
    *group(
        "pallas/gpu_append.py",
        "test_gpu_kernels.py::test_threads_append_nothing",
        ("unsupported", "gpu_ways.by_threads()", "False"),
    ),
    *group(
        "pallas/gpu_ways.py",
        "test_gpu_kernels.py::test_which_gpus_it_takes\ntest_gpu_kernels.py::test_ways_of_gpus",
        ("refusal", "capability() < LEAST", "False"),
        ("refusal", "_said(target) is None", "False"),
        ("refusal", "capability() >= BEYOND", "False"),
        ("by_threads", "< HOPPER", "<= HOPPER"),
        ("unit_of", "capability() == HOPPER", "True"),
        ("shared_bytes", "min(SHARED_KIB.values())", "max(SHARED_KIB.values())"),
    ),
    *group(
        "pallas/gpu_merge.py",
        "test_gpu_kernels.py::test_several",
        ("merge", "lax.div(count + (AT_ONCE - 1), AT_ONCE)", "lax.min(count, 1)"),
        ("merge", "i * AT_ONCE + k", "i * AT_ONCE + 0 * k"),
        ("merge", "jnp.where(is_one, 0.0, -jnp.inf)", "jnp.where(is_one, 0.0, 0.0)"),
    ),
    *group(
        "pallas/gpu_tile.py",
        "test_gpu_kernels.py::test_several\ntest_gpu_kernels.py::test_planted_faults",
        (
            "products",
            "spread(sums, shape) * spread(minimum, shape, 0)",
            "spread(sums, shape) * spread(scale, shape, 0)",
        ),
        (
            "put",
            "jnp.where(filled, scale, 0.0)",
            "scale",
            "test_gpu_kernels.py::test_what_lies_elsewhere_changes_no_bit",
        ),
        ("planes", "start // size", "first // size"),
        ("repack", "spread(minimum, numbers.shape, 0)", "spread(scale, numbers.shape, 0)"),
        ("unpacked", "step * float(zero)", "step"),
        ("pairs", "store(buffer.at[n], x)", "store(buffer.at[0], x)"),
        (
            "split",
            "x = x - piece.astype(F32)",
            "x = piece.astype(F32)",
            "test_gpu_kernels.py::test_parts_sum_up_to_float32",
        ),
    ),
    *group(
        "pallas/gpu_decode.py",
        "test_gpu_kernels.py::test_several\ntest_gpu_kernels.py::test_what_it_does_not_do_is_said",
        ("_mass", "axis=(2, 4)) / spec.group", "axis=(2, 4))"),
        ("_paging", "size % 8 or", "size % 16 or", "test_gpu_kernels.py::test_pages_that_it_takes"),
    ),
    *group(
        "pallas/shares.py",
        "test_gpu_kernels.py::test_queries_are_alike",
        ("alike", "high <= first", "high <= last"),
        ("alike", "low > last - mask.window", "low > first - mask.window"),
        ("alike", "high < mask.num_sinks", "low < mask.num_sinks"),
        ("alike", "found &= low > last - mask.reach", "pass"),
    ),
    *group(
        "pallas/gpu_queries.py",
        "test_gpu_kernels.py::test_rows_in_order_need_not_be_looked_at",
        ("position_columns", "_of_all(jnp.minimum, unsigned)", "_of_all(jnp.maximum, unsigned)"),
        ("position_columns", "_of_all(jnp.minimum, unsigned)", "_of_all(jnp.minimum, request.positions)"),
        ("position_columns", "jnp.where(lane == 1, last, 0)", "jnp.where(lane == 1, first, 0)"),
    ),
    *group(
        "pallas/gpu_unseen.py",
        "test_gpu_kernels.py::test_a_bad_value_reaches_those_who_may_attend_to_it",
        ("added", "jnp.where(found > 0.0, 1, 0)", "0"),
        ("added", "jnp.where(allowed, 1.0, 0.0)", "jnp.where(allowed, 1.0, 1.0)"),
        ("added", "counts >> 16 > 0, -jnp.inf", "counts >> 16 > 0, jnp.inf"),
        ("added", "(counts >> 8) & (COUNTED - 1)", "counts >> 8"),
        ("added", "lax.cond(apart, rounds", "lax.cond(apart & False, rounds"),
    ),
    *group(
        "pallas/gpu_spec.py",
        "test_gpu_kernels.py::test_a_bad_value_reaches_those_who_may_attend_to_it",
        (
            "Spec.hides",
            'self.format.is_scaled and jnp.issubdtype(self.stream("v_data").dtype, jnp.integer)',
            "self.format.is_scaled",
        ),
    ),
    *group(
        "pallas/gpu_columns.py",
        "test_gpu_kernels.py::test_a_bad_value_reaches_those_who_may_attend_to_it",
        ("Columns.are_apart", "lax.min((t + 1) * self.spec.config.tile, self.end) - 1", "t * self.spec.config.tile"),
        ("Columns.are_apart", "high = jnp.max(kv_at, axis=0)", "high = jnp.min(kv_at, axis=0)"),
    ),
    *group(
        "pallas/gpu_tile.py",
        "test_gpu_kernels.py::test_a_bad_value_reaches_those_who_may_attend_to_it",
        ("scaled", "product if spec.is_single else jnp.where(allowed, product, 0.0)", "product"),
        ("put", "jnp.where(scale == scale, scale, 0.0)", "scale"),
    ),
    *group(
        "pallas/gpu_merge.py",
        "test_gpu_kernels.py::test_a_bad_value_reaches_those_who_may_attend_to_it",
        ("merge", "jnp.where(spread(is_one, out.shape, ()), out, 0.0)", "out"),
        ("merge", "jnp.where(spread(empty, acc.shape, ()), 0.0, acc / safe)", "(acc / safe)"),
        ("merge", "line.at[pl.ds(0, features)], target", "line.at[pl.ds(16, features)], target"),
    ),
    *group(
        "pallas/common.py",
        "test_tpu_kernels.py::test_a_bad_value_reaches_those_who_may_attend_to_it",
        ("slot_positions", "request.mask.is_bounded or request.mask.causal", "request.mask.is_bounded"),
    ),
    *group(
        "_target.py",
        "test_target.py::test_the_current_mesh_knows_its_gpus_better",
        ("of_arrays", "_known_better(Target.of_device(device))", "Target.of_device(device)"),
        ("_known_better", "== (target.platform, target.device_kind)", "!= (target.platform, target.device_kind)"),
    ),
    *group(
        "attend/api.py",
        "test_gpu_kernels.py::test_no_query_waits_for_others",
        ("_by_position.call", "or hides(request)", ""),
        ("_by_position.call", "or all_for_all or", "or"),
        ("_by_position.call", "request.of_several and not request.mask.is_bounded", "request.of_several"),
        ("_by_position.call", "length == 1 or all_for_all or hides(request)", "True"),
    ),
    *group(
        "pallas/tpu_decode.py",
        """
        test_tpu_kernels.py::test_scores_of_one_tile_above_those_of_the_last
        test_tpu_kernels.py::test_minima_and_scales_in_several_pages
        test_tpu_kernels.py::test_planted_faults
        """,
        ("_by_row", "row[i], core,", "row[i], 0 * core,", "test_tpu_kernels.py::test_two_cores_share_the_heads"),
        ("cores_for", "view.num_kv_heads % cores == 0", "True", "test_tpu_kernels.py::test_devices_of_two_cores"),
        ("_body", "total[k] * keep", "total[k]"),
        ("_body", "slopes[k] * (kv_at - q_at)", "slopes[k] * (q_at - kv_at)"),
        ("_body", "None if every_slot_is_filled else x >= 0", "None"),
    ),
    *group(
        "pallas/gpu_fetch.py",
        "test_gpu_kernels.py::test_several",
        ("Fetcher._by_warps", "copies[number::WARPS]", "copies[::WARPS]"),
    ),
    *group(
        "pallas/tpu_fetch.py",
        """
        test_tpu_kernels.py::test_only_pieces_that_hold_something_are_fetched
        test_tpu_kernels.py::test_minima_and_scales_in_several_pages
        test_tpu_kernels.py::test_two_cores_share_the_heads
        test_tpu_kernels.py::test_values
        """,
        ("Pages.some", "tile * self.parts + part", "tile * self.parts"),
        ("Pages.some", "pl.ds(self.core * target.shape[0],", "pl.ds(0 * target.shape[0],"),
        ("Pages.held", "buffer.at[part]", "buffer.at[0]"),
        (
            "Pages.places",
            "% order.pages_beside",
            "% 1",
            "test_tpu_kernels.py::test_what_lies_elsewhere_changes_no_bit\ntest_tpu_kernels.py::test_values",
        ),
        ("Pieces._copy", "pl.ds(self.core * buffer.shape[0],", "pl.ds(0 * buffer.shape[0],"),
        ("Pieces._copy", "buffer.at[:, *tokens(part)]", "buffer.at[:, *tokens(0)]"),
        ("Pieces._copy", "self.number[tile] * self.parts + part", "self.number[tile] * self.parts"),
        ("Pieces._copy", "if order.tokens_last else", "if not order.tokens_last else"),
        ("Pieces._copy", "self.row[tile]", "self.row[0]"),
        ("Fetcher._copy", "self.arrived.at[tile % 2]", "self.arrived.at[0]"),
    ),
    *group(
        "pallas/tpu_bits.py",
        "test_tpu_bits.py",
        ("float8", " + magnitudes) | magnitudes)", " + magnitudes))"),
        ("float8", "words & (((words", "words | (((words"),
        ("signed", "0x88888888", "0x08080808"),
        ("nibbles", "4 * plane + 8 * odd", "4 * plane + 4 * odd"),
        ("_magnitude", "jnp.minimum(fine - jnp.float32(2.0**-14), 0)", "0"),
        ("_magnitude", "(112 << 23)", "(113 << 23)"),
        ("Native.of", '("TPU v6", "TPU7")', '("TPU v5", "TPU v6", "TPU7")'),
        ("Native.of", 'kind.startswith("TPU7")', 'kind.startswith("TPU")'),
    ),
    *group(
        "pallas/tiles.py",
        "test_tpu_kernels.py::test_only_pieces_that_hold_something_are_fetched",
        ("parts_of", "cut <<", "(cut * 0 + 1) >>"),
        ("parts_of", "chosen.row * tiles + chosen.tile", "chosen.tile"),
    ),
    *group(
        "pallas/tpu_read.py",
        """
        test_tpu_kernels.py::test_minima_and_scales_in_several_pages
        test_tpu_kernels.py::test_what_lies_elsewhere_changes_no_bit
        test_tpu_kernels.py::test_values
        """,
        ("Store._grouped_scores", "(low - self._offset * step)", "(low + self._offset * step)"),
        (
            "Store._grouped_mix",
            "- self._offset * weights.astype(jnp.float32)",
            "",
            "test_tpu_kernels.py::test_four_bits_for_bfloat16_queries",
        ),
        ("Store._grouped_mix", "low - self._offset * step", "low"),
        ("Store._grouped_scores", "2 * shift", "4 * shift"),
        ("Store._grouped_mix", "jnp.where(filled, x, 0.0)", "x"),
        ("Store.mix", "jnp.where(filled, factor, 0.0)", "factor"),
        ("Store._cleared", "jnp.where(filled, tile.astype(jnp.float32), 0.0)", "tile.astype(jnp.float32)"),
    ),
    *group(
        "pallas/tpu_append.py",
        """
        test_tpu_kernels.py::test_a_token_is_written_into_contiguous_slots
        test_tpu_kernels.py::test_rows_that_write_nothing_stay_away_from_the_pages_of_others
        test_tpu_kernels.py::test_a_token_is_written_where_it_belongs
        """,
        ("_in_rows", "jnp.maximum(at, 0) // size", "jnp.maximum(at, 0) // size * 0"),
        ("_in_rows", "% slots.shape[1]", "% 1"),
        ("_in_rows", "at % size, -1)", "at % size, 0)"),
        ("_in_pages", "page[stand]", "page", "test_tpu_kernels.py::test_no_block_comes_again_once_it_was_left"),
        ("_body", "(major[i] != major[before]) |", ""),
    ),
    # Placement ---------------------------------------------------------------------------------------------------
    *group(
        "sharding/sequence.py",
        """
        test_sharding.py::test_slots_of_several_blocks
        test_sharding.py::test_equals_one_device
        """,
        ("Share.all_slots", "axis=3, tiled=True", "axis=2, tiled=True"),
        ("Share.all_slots", "[:, :, :count]", "[:, :, -count:]", "test_sharding.py::test_equals_one_device"),
        (
            "Share.all_new",
            "[:, :, :length]",
            "[:, :, -length:]",
            "test_sharding.py::test_what_devices_measured_is_put_together",
        ),
        ("Share.of_chunk", "mine(positions, -1)", "mine(positions)", "test_sharding.py::test_equals_one_device"),
        (
            "Share.joined",
            "jax.lax.pmax(jax.lax.stop_gradient(lse), self.axis)",
            "jax.lax.stop_gradient(lse)",
            "test_sharding.py::test_equals_one_device",
        ),
    ),
    *group(
        "cache/layout.py",
        "test_sharding.py::test_slots_of_several_blocks",
        ("Layout.slots_in_share", "slots // self.rows * rows + row % rows", "row % rows"),
        ("Layout.share", "self.num_blocks * rows, rows", "rows, rows"),
    ),
    *group(
        "codecs/kivi.py",
        "test_paged.py::test_copies_and_selections_take_everything_along",
        ("KIVI.axes", '"one rows heads recent features"', '"one heads rows recent features"'),
    ),
    *group(
        "sharding/heads.py",
        "test_sharding_faults.py::test_copies_lie_beside_each_other\ntest_sharding.py::test_equals_one_device",
        ("repeated", "jnp.repeat(x, copies, axis=axis)", "jnp.concatenate([x] * copies, axis=axis)"),
        (
            "SomeOfGroup.of_group",
            "/ self.copies",
            "/ 1",
            "test_sharding.py::test_what_devices_measured_is_put_together",
        ),
        ("repeated", "cache, cache.axes)", "cache, cache.axes).replace(values=cache.values)"),
    ),
    *group(
        "sharding/batch.py",
        "test_sharding.py::test_equals_one_device\ntest_sharding.py::test_an_encoders_cache",
        ("Batch._exchanged.call", "split_axis=axis, concat_axis=0", "split_axis=0, concat_axis=axis"),
    ),
    *group(
        "sharding/choose.py",
        "test_sharding_placing.py::test_choose",
        ("_choice", "batch_size > n and", "batch_size >= n and", "", "a batch of n rows divides, and was taken before"),
    ),
    # Layers and models -------------------------------------------------------------------------------------------
    *group(
        "layers/decode.py",
        """
        test_layers_nnx.py::test_positions_mean_the_same_in_flax_cache
        test_layers_nnx.py::test_under_jit_tokens_that_do_not_fit_are_dropped_and_recorded
        test_layers_linen.py::test_positions_mean_the_same_in_flax_cache
        """,
        ("extend", "taken if input_positions is None", "taken * 0 if input_positions is None"),
        ("extend", "rotate(settings.rope, key, rotate_at)", "key"),
        ("_write", "jnp.where(fits, new, old)", "new"),
    ),
    *group(
        "layers/masking.py",
        """
        test_layers_nnx.py::test_positions_mean_the_same_in_flax_cache
        test_layers_linen.py::test_positions_mean_the_same_in_flax_cache
        """,
        ("visible", "window=window, ", ""),
    ),
    *group(
        "models/loop.py",
        """
        test_generate.py::test_steps_take_the_caches_over
        test_score.py::test_rows_of_one_batch_go_by_their_own_settings
        """,
        ("_compiled", '@functools.partial(jax.jit, donate_argnames="cache")\n    def step', "@jax.jit\n    def step"),
        (
            "_compiled",
            '@functools.partial(jax.jit, donate_argnames="cache")\n    def append',
            "@jax.jit\n    def append",
        ),
        ("chosen", "came.astype(jnp.int32)", "0"),
        ("chosen", "num_drawn < settings.limit", "num_drawn <= settings.limit"),
        ("chosen", "jnp.where(came, goes_on, rows.running)", "goes_on"),
        (
            "chosen",
            "log_probability(logits, token)",
            "log_probability(logits / settings.sampler.temperature[:, None], token)",
            "test_score.py::test_log_probabilities_are_the_models_own",
        ),
        (
            "_compiled.advance",
            "ends & (num_new > 0)",
            "num_new > 0",
            "test_score.py::test_a_row_is_replaced_while_the_others_go_on",
        ),
        ("_holds", "token % _WORD", "token % 31", "test_score.py::test_stop_sets_hold_what_was_put_in"),
        (
            "Decoding.append_last",
            "np.ones(len(tokens), bool)",
            "np.zeros(len(tokens), bool)",
            "test_score.py::test_log_probabilities_are_the_models_own",
        ),
        ("select", "x[rows]", "x[rows[::-1]]", "test_score.py::test_rows_are_left_out_moved_and_repeated"),
    ),
    *group(
        "models/score.py",
        "test_score.py::test_scores_are_those_of_full_passes\ntest_score.py::test_few_logits_at_once",
        ("_scored", "row[1:] for row in rows", "row[:-1] for row in rows"),
        (
            "_scored",
            "lengths - start, 0, chunk",
            "lengths, 0, chunk",
            "test_score.py::test_capacity_for_the_tokens_alone",
        ),
        ("_in_slices", "jnp.moveaxis(out, 0, 1)", "out"),
        ("_in_slices", "count * size - length)]", "count * size - length)][::-1]"),
        ("_on_host", "zip(logprobs, counts", "zip(logprobs, counts[::-1]"),
        (
            "_repeated",
            "decoding.step(forced[:, number])",
            "decoding.step()",
            "test_score.py::test_scores_that_repeat_decoding_in_every_bit",
        ),
    ),
    *group(
        "models/decoder.py",
        "test_models.py::test_pads_on_either_side\ntest_models.py::test_logits_of_some_tokens",
        ("Decoder.hidden", "tokens.shape[1] - num_new", "num_new"),
        ("Decoder.hidden", "-placement.like_rows(late, x)", "placement.like_rows(late, x)"),
        ("_at", "at < 0, length", "at < 0, 0"),
        ("_at", 'mode="fill"', 'mode="clip"'),
    ),
    *group(
        "models/sampling.py",
        "test_generate.py::test_the_smallest_set_that_reaches_a_weight\ntest_generate.py::test_one_candidate_is_the_greedy_choice",
        ("best_reaching", "tied_before * weights < target", "tied_before * weights <= target"),
        ("best_reaching", ">= target, higher, lowest", "> target, higher, lowest"),
        (
            "_drawn.one",
            "jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream), number)",
            "jax.random.fold_in(jax.random.key(seed), number)",
            "test_generate.py::test_drawn_numbers_and_rows_differ",
        ),
        (
            "_drawn.one",
            "jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream), number)",
            "jax.random.fold_in(jax.random.key(seed), stream)",
            "test_generate.py::test_drawn_numbers_and_rows_differ",
        ),
        (
            "_drawn",
            "draws & (sampler.top_p < 1)",
            "False & draws",
            "test_score.py::test_rows_of_one_batch_go_by_their_own_settings",
        ),
        (
            "choose",
            "jnp.where(draws, _drawn(*given), most_probable)",
            "_drawn(*given)",
            "test_score.py::test_rows_of_one_batch_go_by_their_own_settings",
        ),
    ),
    # Model families ----------------------------------------------------------------------------------------------
    *group(
        "families/settings.py",
        "test_extending_family.py",
        ("Settings.__init__", "if value != values[0][1]:", "if False:"),
        ("Settings.get", "value is None and default is not None", "False"),
        ("Settings.get", "self._given.get(name, default)", "self._given.get(name)"),
    ),
    *group(
        "families/registry.py",
        "test_extending_family.py",
        ("register", "name in names or find(name) is not None", "name in names"),
        ("register", "name in names or find(name) is not None", "find(name) is not None"),
    ),
    *group(
        "families/layers.py",
        "test_memory.py::test_windows_layer_by_layer",
        ("windowed_from", "i >= start", "i > start"),
        ("windowed", 'FULL if f.get("sliding_window") is None else WINDOW', "WINDOW"),
    ),
    *group(
        "families/fields.py",
        "test_extending_family.py",
        ("Fields.finish", "n not in known and not is_harmless(n, x)", "False"),
        ("Fields.get", 'name not in self.format.defaults and name != "quantization_config"', "False"),
    ),
    *group(
        "families/fields.py",
        "test_checkpoints.py::test_absent_fields_have_the_familys_defaults",
        ("Fields._turned", "int(head_dim * fraction)", "int(head_dim * fraction / 2)"),
    ),
    *group(
        "families/layers.py",
        "test_checkpoints.py::test_absent_fields_have_the_familys_defaults[smollm3]",
        ("turned", "(i + 1) % every", "i % every"),
    ),
    *group(
        "families/rules.py",
        "test_pretrained.py::test_whole_prompts",
        (
            "gate_and_up",
            "range(hidden)), ",
            "range(hidden, 2 * hidden)), ",
            "test_pretrained.py::test_whole_prompts[phi3]",
        ),
        ("Stacked.read", ")[along]", ")[::-1][along]", "test_pretrained.py::test_whole_prompts[mixtral]"),
        ("_Parts._of_heads", "((0, 1),)", "((1, 0),)", "test_pretrained.py::test_whole_prompts[olmo2]"),
    ),
    *group(
        "families/hf/granite.py",
        "test_pretrained.py::test_whole_prompts[granite]",
        ("_blueprint", '1 / fields.positive("logits_scaling")', 'fields.positive("logits_scaling")'),
        ("_blueprint", '"attention_multiplier"', '"embedding_multiplier"'),
    ),
    *group(
        "families/hf/cohere2.py",
        "test_pretrained.py::test_whole_prompts[cohere2]",
        ("_blueprint", "window is not None", "window is None"),
        ("_blueprint", "rope_interleaved=True", "rope_interleaved=False"),
    ),
    *group(
        "families/params.py",
        "test_checkpoints.py::test_published_configs",
        ("gated", " + shared_params(f))", ")", "test_checkpoints.py::test_published_configs[qwen1.5-moe-a2.7b]"),
        ("gated", "bias and out_bias", "bias", "test_checkpoints.py::test_published_configs[glm-4-9b]"),
    ),
    *group(
        "families/text_part.py",
        "test_checkpoints.py::test_what_is_said_around_a_text_part",
        ("to_load", 'config.get("model_type") not in _UNTIED', "False"),
        ("to_load", 'config.get("model_type") not in _UNTIED', "True", "test_checkpoints.py::test_published_configs"),
        ("to_load", "not _OF_OTHERS.search(name)", "False", "test_checkpoints.py::test_flags_that_cannot_be_honoured"),
    ),
    *group(
        "models/block.py",
        "test_pretrained.py::test_whole_prompts[granite]",
        ("Block._scaled", "y if self.residual_scale is None else ", "y if True else "),
        ("Block.__init__", '!= "output"', '!= "outputs"', "test_pretrained.py::test_whole_prompts[olmo2]"),
    ),
    *group(
        "models/block.py",
        "test_pretrained.py::test_whole_prompts[gemma4]",
        ("Block.__call__", "x = x * self.scale[...].astype(x.dtype)[None, None]", "pass"),
        ("Block.__call__", "x = x + self.own_embedding(x, embedded)", "pass"),
        ("attention_of", "value_norm=is_owner and config.value_norm", "value_norm=False"),
    ),
    *group(
        "models/parts.py",
        "test_pretrained.py::test_whole_prompts[gemma4]",
        ("OwnEmbeddings.__call__", "self.size**0.5", "1"),
        ("OwnEmbeddings.__call__", "self.norm(projected)", "projected"),
    ),
    *group(
        "models/decoder.py",
        "test_shared_layers.py::test_decoders",
        ("Decoder._through", "tokens.shape[1] == 1 or _keeps_a_chunk(before)", "True"),
        (
            "Decoder._through",
            "there.status | marked.status",
            "marked.status * 0",
            "test_shared_layers.py::test_what_is_refused_stays_refused",
        ),
        (
            "Decoder._through",
            "there.lengths - before.lengths",
            "num_new",
            "test_shared_layers.py::test_what_is_refused_stays_refused",
        ),
    ),
    *group(
        "models/decoder.py",
        "test_pretrained.py::test_whole_prompts[granite]",
        ("Decoder.logits", "logits * self.config.logit_scale", "logits"),
    ),
    *group(
        "models/experts.py",
        """
        test_experts.py::test_experts_one_by_one
        test_experts.py::test_tokens_that_agree
        """,
        ("Experts._chosen", "jax.nn.softmax(best.astype(jnp.float32))", "best.astype(jnp.float32)"),
        ("Experts._chosen", "best / (jnp.sum(best, axis=-1, keepdims=True) + 1e-20)", "best"),
        ("Experts._chosen", "best = jnp.take_along_axis(scores, chosen, axis=-1)", "pass"),
        ("Experts._chosen", "scores + added[None].astype(scores.dtype)", "scores"),
        ("Experts._chosen", "best * config.expert_scale", "best"),
        ("Experts._chosen", 'config.expert_scores == "sigmoid"', "False"),
        ("Experts._chosen", "and config.group_best == 1", "", "test_experts.py::test_experts_one_by_one"),
        ("Experts._in_best_groups", "config.group_best)", "1)"),
        ("Experts._in_best_groups", "config.groups_per_token)", "count)"),
        (
            "Experts._of_experts",
            "seen.astype(jnp.float32) if self.config.router_float32 else seen",
            "seen",
            "",
            "the router's own dtype makes it float32",
        ),
        (
            "Experts.__init__",
            '{"dtype": jnp.float32} if config.router_float32 else {}',
            "{}",
            "test_experts.py::test_a_router_in_float32",
        ),
        ("Experts._of_all", "y * jax.nn.sigmoid(", "y * jax.nn.silu("),
        ("Experts._expert", "(linear + 1) * gated", "linear * gated"),
        ("_Blocks.__init__", "min(num_experts, choices) +", "min(num_experts, choices) - 1 +"),
        ("_Blocks.__init__", 'side="right"', 'side="left"'),
        ("_Blocks.__init__", "(jnp.cumsum(sizes) - sizes)[expert]", "jnp.cumsum(sizes)[expert]"),
        ("_Blocks.gathered", "// self.per_token", "% nobody"),
        (
            "Experts._expert",
            "jax.lax.dynamic_index_in_dim(p, expert, keepdims=False)",
            "jnp.einsum('e...,e->...', p, jax.nn.one_hot(expert, p.shape[0]))",
            "test_experts.py::test_a_decode_step_reads_the_chosen_experts",
        ),
    ),
    # How many pages tokens take, and what the planner makes of it ------------------------------------------------
    *group(
        "_paging.py",
        """
        test_paged_groups.py::test_pages_at_once_are_those_that_the_rule_needs
        test_memory.py::test_pages_that_sequences_hold
        """,
        ("pages_for", "-(-num_tokens // page_size)", "num_tokens // page_size + 1"),
        ("pages_at_once", "window - 1 + chunk - 1", "window + chunk - 1"),
        ("pages_at_once", "window - 1 + chunk - 1", "window - 1", "test_memory.py::test_pages_that_sequences_hold"),
        ("pages_at_once", "min(length, slots)", "slots"),
        ("pages_at_once", "min(pages, pages_for", "max(pages, pages_for"),
    ),
    *group(
        "memory/formula.py",
        """
        test_memory.py::test_policies_and_codecs_in_pages
        test_memory.py::test_heads_that_give_pages_back_are_counted_whole
        test_memory.py::test_what_a_device_holds_in_pages
        """,
        ("Layer.num_pages", "length, self.chunk", "length", "test_memory.py::test_window_groups_of_gpt_oss"),
        (
            "Layer.num_slots",
            "length if held is None else held",
            "length",
            "test_memory.py::test_mean_length_and_pages",
        ),
        ("Layer.kept", "min(kept, window)", "kept", "test_memory.py::test_a_window_is_read_however_much_is_kept"),
        (
            "Layer.nbytes",
            "-(-rows * (slots // self.page_size) // parts)",
            "rows * -(-slots // (self.page_size * parts))",
        ),
        ("Layer.nbytes", "rows * self.table_bytes(length)", "rows * self.table_bytes(length) // parts"),
        ("Layer.table_bytes", "self.num_kv_heads if self.policy.is_uneven else 1", "1"),
        ("Layer.table_bytes", "slots_of(self.policy, self.page_size, columns)", "most_slots(self.policy, length)"),
        ("Layer.table_bytes", " + self.num_kv_heads * self.storage.rest", ""),
    ),
    *group(
        "memory/caches.py",
        """
        test_memory.py::test_refused
        test_memory.py::test_window_groups_of_gpt_oss
        """,
        ("layers", "SlidingWindow if page_size is None else OrderedWindow", "SlidingWindow"),
        ("layers", "codec.rows not in (None, page_size)", "False"),
        ("layers", " > 1 and page_size is None", " > 1 and False"),
        ("_check_pages", "num_pages * (1 + strips)", "num_pages"),
    ),
    *group(
        "memory/holding.py",
        """
        test_memory.py::test_refused
        test_memory.py::test_window_groups_of_gpt_oss
        test_memory.py::test_heads_that_give_pages_back_are_counted_whole
        """,
        ("Holding.of", "placement.parts > 1", "placement.parts > 2"),
        ("Holding.notes", "len(each) > 1", "each"),
        ("Holding.notes", "asked.policy is not None and asked.policy.is_uneven", "False"),
    ),
    *group(
        "memory/plan.py",
        """
        test_memory.py::test_mean_length_and_pages
        test_memory.py::test_the_largest_batch_and_length
        """,
        ("_memory", "length=asked.length, held=asked.mean_length", "length=asked.length"),
        ("_memory", "most * placement.groups", "most"),
        ("_unused", "layer.kept(held)", "min(held, layer.num_slots(length, held))"),
    ),
    *group(
        "memory/levers.py",
        "test_memory.py::test_pages_as_a_lever",
        ("_changes", "(base.codec and base.codec.rows) or PAGE_SIZE", "PAGE_SIZE"),
    ),
    *group("memory/hf_config.py", "test_extending_family.py", ("_refuse", "not is_known and _ENCODERS", "_ENCODERS")),
    *group("models/pretrained.py", "test_extending_family.py", ("_check_blueprint", "made != parameters", "False")),
    # What leaves the process, derivatives past codes, types of mesh axes ---------------------------------------------
    *group(
        "_trees.py",
        "test_trees.py",
        ("Tree.__eq__", "structure == other_structure and ", ""),
        ("_from_state_dict", "if repr(here) != repr(there)", "if False"),
        ("_from_state_dict", "if other:", "if False:"),
        ("_plain", '{"tuple": [_plain(x) for x in value]}', "[_plain(x) for x in value]"),
    ),
    *group(
        "_manual.py",
        "test_shard_map.py",
        ("_settled", "jax.tree.map(lambda x: _over(x, axes), carry)", "carry"),
        (
            "alike",
            "frozenset().union(*map(_axes, each))",
            "_axes(each[0])",
            "test_shard_map.py::test_either_branch_may_be_the_same_on_all_devices",
        ),
        (
            "alike",
            "frozenset().union(*map(_axes, each))",
            "_axes(each[-1])",
            "test_shard_map.py::test_either_branch_may_be_the_same_on_all_devices",
        ),
        (
            "result",
            "_axes_of(operands)",
            "frozenset()",
            "test_shard_map.py::test_a_kernel_returns_what_differs_as_what_it_reads",
        ),
    ),
    *group(
        "attend/reference.py",
        "test_straight_through.py\ntest_meanings.py::test_position_decides_whom_a_bad_value_reaches",
        ("_", "primals[0], tangents[1]", "primals[0], tangents[0]"),
        (
            "_past_codes",
            "new.swapaxes(1, 2)",
            "new.swapaxes(1, 2)[:, :, ::-1]",
            "test_straight_through.py::test_the_call_of_several_tokens",
        ),
        ("_mixed", "product(probs, jnp.where(finite, values, 0))", "product(probs, values)"),
        ("_mixed", "jnp.where(met(jnp.isneginf(values)), -jnp.inf, 0)", "0"),
    ),
    *group(
        "attend/xla.py",
        "test_meanings.py::test_position_decides_whom_a_bad_value_reaches",
        (
            "_Walk.mixed",
            "jnp.where(jnp.all(jnp.isfinite(mixed)), 0, length)",
            "jnp.where(jnp.any(jnp.isfinite(mixed)), 0, length)",
        ),
        ("_Walk.mixed", "[:, :, 0]", "[:, :, 0] | True"),
    ),
    *group(
        "cache/status.py",
        "test_sharding.py::test_what_the_last_device_alone_saw_is_told",
        ("_on_every_device", "status.addressable_shards", "status.addressable_shards[:1]"),
    ),
    *group(
        "codecs/plain.py",
        "test_verbs.py::test_a_number_that_is_too_large_is_not_stored_silently",
        ("Plain.unfit", "jnp.finfo(x.dtype).max <= jnp.finfo(self.dtype).max", "True"),
        ("Plain.unfit", "jnp.isfinite(x) & ", ""),
    ),
    *group(
        "codecs/kivi.py",
        """
        test_codecs.py::test_kivi_says_which_tokens_its_residual_holds
        test_straight_through.py::test_kivi_on_both_sides_of_its_flush
        test_straight_through.py::test_the_call_of_one_token
        """,
        ("KIVI.as_they_came", "last - (last - row) % self.residual", "last - (last - row - 1) % self.residual"),
    ),
    # Positions ---------------------------------------------------------------------------------------------------
    *group(
        "positions/rope.py",
        "test_positions.py::test_pairs\ntest_positions.py::test_only_the_distance_counts_however_far\ntest_positions.py::test_matches_transformers",
        ("_turned", "turning[..., 0::2], turning[..., 1::2]", "turning[..., 1::2], turning[..., 0::2]"),
        ("_cos_sin", "sin * factor", "sin"),
    ),
    *group(
        "positions/alibi.py",
        "test_positions.py::test_alibi_slopes_are_blooms",
        ("alibi_slopes", "[0::2]", "[1::2]"),
    ),
    *group(
        "positions/scaling.py",
        "test_positions.py::test_matches_transformers\ntest_positions.py::test_every_field_of_the_rope_dict_matters",
        ("_yarn", "math.floor(low), math.ceil(high)", "math.ceil(low), math.floor(high)"),
        ("_longrope", '"short_factor"', '"long_factor"'),
        ("longrope_attention_factor", "1 + math.log(factor)", "math.log(factor)"),
    ),
    *group(
        "positions/phases.py",
        "test_positions.py::test_longrope_takes_the_length_from_the_row",
        ("_turns", "lengths > math", "lengths >= math"),
        ("_turns", "jnp.where(is_long, b, a)", "a"),
    ),
    *group(
        "attend/request.py",
        "test_positions.py::test_keys_that_move_go_by_the_length_of_their_row[longrope]",
        ("rotated", "if request.key_rope.depends_on_length:", "if False:"),
    ),
    *group(
        "layers/norms.py",
        "test_layers_norms.py::test_against_numpy",
        ("normalized", "(-2, -1) if joint", "(-1,) if joint"),
        ("normalized", 'kind == "layer"', 'kind == "rms"'),
    ),
    # Serving -----------------------------------------------------------------------------------------------------
    *group(
        "serving/blocks.py",
        """
        test_serving_blocks.py::test_random_operations
        test_serving_bad_input.py::test_rows
        """,
        ("BlockPool.free", "self._sequences.pop(", "self._sequences.get("),
        *(
            (
                name,
                "has_changed = True",
                "has_changed = False",
                "test_serving_scheduler.py::test_tables_of_rows_are_those_of_their_texts",
            )
            for name in ("BlockPool.append", "BlockPool.forget", "_Sequence.__init__")
        ),
        ("BlockPool.free", "reversed(state.table[state.forgotten :])", "reversed(state.table[state.forgotten : -1])"),
        ("BlockPool.forget", "            state.forgotten = end\n", ""),
        ("BlockPool.forget", "            self._counts.let_go(gone)\n", ""),
        ("BlockPool.forget", "NOTHING * len(gone)", "gone"),
        ("BlockPool._forgettable", "count // self.block_size", "-(-count // self.block_size)"),
        ("BlockPool._forgettable", "count > state.length", "count > state.length + 1"),
        ("BlockPool.fork", "            self._counts.refs[block] += 1\n", "            pass\n"),
        ("BlockPool.fork", "state.table[:]", "state.table"),
        ("BlockPool.fork", "state.forgotten)\n", "0)\n"),
        ("BlockPool.append", "counts.refs[table[-1]] > 1", "counts.refs[table[-1]] > 2"),
        ("BlockPool.append", "copied = tail and num_tokens", "copied = tail and num_tokens > 1"),
        ("BlockPool.append", "            counts.refs[source] -= 1\n", ""),
        ("BlockPool.append", "            table[-1] = target\n", ""),
        ("BlockPool.append", "copies.append((source, target))", "copies.append((target, source))"),
        ("BlockPool.append", "if missing + bool(copied) > self.num_free", "if missing > self.num_free"),
        ("BlockPool.append", "min(tail + num_tokens, self.block_size)", "tail"),
        (
            "BlockPool.append_cost",
            "len(state.table) + shared",
            "len(state.table)",
            "test_serving_blocks.py::test_costs_are_what_calls_take",
        ),
        ("BlockPool.forget_gain", "== 1", ">= 1"),
        ("BlockPool.allocate", "            counts.refs[block] += 1\n", "            pass\n"),
        (
            "BlockPool.allocate",
            "        self._sequences[seq] = _Sequence(table, length, first)  # a hash that raises changes nothing\n"
            "        for block in table[first:]:\n            counts.refs[block] += 1\n        table.extend(fresh)\n"
            "        counts.take(fresh, length)\n",
            "        for block in table[first:]:\n            counts.refs[block] += 1\n        table.extend(fresh)\n"
            "        counts.take(fresh, length)\n        self._sequences[seq] = _Sequence(table, length, first)\n",
            "test_serving_blocks.py::test_an_interrupt_changes_nothing",
        ),
        ("BlockPool.allocatable", "new > self.num_free", "new > self.num_free + 1"),
        ("BlockPool._planned", "tokens < self.block_size", "tokens < 0"),
        ("BlockPool._planned", "len(set(blocks)) != len(blocks)", "False"),
        ("BlockPool._planned", "* self.block_size > count", "* self.block_size > count + self.block_size"),
        (
            "BlockPool.can_allocate",
            'else "never"',
            'else "later"',
            "test_serving_blocks.py::test_admission_is_the_formula",
        ),
        (
            "BlockPool.can_allocate",
            "self.num_free - new >= self._reserve",
            "self.num_free - new > self._reserve",
            "test_serving_blocks.py::test_admission_is_the_formula",
        ),
        (
            "BlockPool.can_allocate",
            " - table.count(NO_BLOCK)",
            "",
            "test_serving_blocks.py::test_a_prefix_needs_no_blocks_of_its_own",
        ),
        (
            "BlockPool.__init__",
            "math.floor(watermark",
            "math.ceil(watermark",
            "test_serving_blocks.py::test_a_small_pool_admits_a_request_of_its_own_size",
        ),
        (
            "BlockPool.page_table",
            "(NOTHING * width)",
            '(array("i", [0]) * width)',
            "test_serving_blocks.py::test_tables_of_a_batch",
        ),
        ("BlockPool.check", "self._counts.check(", "Counter(", "test_serving_blocks.py::test_check_finds"),
        ("BlockPool.check", "fill != min", "fill < 0 and fill != min", "test_serving_blocks.py::test_check_finds"),
        ("BlockPool.usage", "entries.total()", "len(entries)", "test_serving_blocks.py::test_usage"),
    ),
    *group(
        "serving/ledger.py",
        """
        test_serving_ledger.py::test_moves_apply_in_order
        test_serving_ledger.py::test_a_host_that_cannot_be_emptied_stays
        test_serving_ledger.py::test_a_host_comes_back_under_its_number
        test_serving_ledger.py::test_random_operations
        test_serving_ledger.py::test_each_call_is_another_digest
        test_serving_ledger.py::test_rows
        """,
        ("Ledger.free", "        del self._accounts[name]\n", ""),
        ("Ledger.free", "            self._borrowers.pop(block, None)\n", "            pass\n"),
        ("Ledger.repay", "len(moves) < limit", "len(moves) <= limit"),
        ("Ledger.repay", "min(", "max("),
        ("Ledger.repay", "table[table.index(source)] = target", "table.append(target)"),
        ("Ledger.add_host", "if number not in", "if number + 1 not in"),
        ("Ledger.remove_host", "self._lending.copy()", "self._lending"),
        ("Ledger.remove_host", "home = after.richest()", "home = min(after.free)"),
        ("Ledger.remove_host", "                after.settle(block)\n                target", "                target"),
        ("Ledger._extend", "count > (room := lending.room(home))", "count > (room := lending.room(home)) + 1"),
        ("Ledger._extend", "tuple(blocks))", "())", "test_serving_ledger.py::test_the_digest_is_known"),
        ("Ledger._note", "what, *done", "what", "test_serving_ledger.py::test_each_call_is_another_digest"),
    ),
    *group(
        "serving/lending.py",
        """
        test_serving_ledger.py::test_who_has_most_lends
        test_serving_ledger.py::test_the_oldest_loan_is_repaid_first
        test_serving_ledger.py::test_a_trace_fits_exactly_if_its_sum_does
        test_serving_ledger.py::test_random_operations
        """,
        ("Lending.__init__", "math.floor", "math.ceil"),
        ("Lending.richest", "-len(", "len("),
        ("Lending.richest", ", host))", ", -host))"),
        ("Lending.lendable", " - self.reserve, 0", ", 0"),
        ("Lending.room", "if host != home", ""),
        ("Lending.take", "                self.owe(home, block)\n", "                pass\n"),
        ("Lending.take", "            self.free[host].pop()\n", ""),
        ("Lending.planned", "                left[host] -= 1\n", "                left[host] -= 2\n"),
        ("Lending.planned", "-left[host], host", "left[host], host"),
        ("Lending.owe", "        self._loans_made += 1\n", ""),
        ("Lending.settle", "            del self.owed[debtor][block]\n", "            pass\n"),
        ("Lending.give_back", "        self.settle(block)\n", ""),
        ("Lending.able", "if owed and self.free[debtor]", "if owed"),
        ("Lending.repay", "        self.give_back(block)\n", "        self.settle(block)\n"),
    ),
    *group(
        "serving/digests.py",
        """
        test_serving_ledger.py::test_no_two_values_are_written_alike
        test_serving_ledger.py::test_names_that_are_equal_are_one
        test_serving_ledger.py::test_each_call_is_another_digest
        """,
        ("written", 'b"t%x:" % len(value) + ', ""),
        ("written", 'b"s%x:" % len(text) + text', 'b"s" + text'),
        ("written", "i%x;", "i%x"),
        ("written", 'return b"b%x', 'return b"s%x'),
        ("after", "digest + written", "written", "test_serving_ledger.py::test_the_digest_is_known"),
        ("plain", "return int(value)", "return value"),
        ("plain", "return str.__str__(value)", "return value"),
    ),
    *group(
        "serving/hosted.py",
        """
        test_serving_hosts.py::test_home_first_then_who_has_most
        test_serving_hosts.py::test_shared_blocks_stay_where_they_are
        test_serving_hosts.py::test_a_pool_of_hosts_is_a_pool
        test_serving_hosts.py::test_check_finds
        """,
        ("HostedPool.allocate", "self._lending.richest()", "0"),
        ("HostedPool.append", "self._homes[seq] if seq in self else 0", "0"),
        ("HostedPool.fork", "self._homes[parent]", "0"),
        ("HostedPool.repay", "if refs[block] == 1 and block in tables", "if block in tables"),
        ("HostedPool.repay", "            table[table.index(source)] = target\n", ""),
        (
            "HostedPool.repay",
            "            state.has_changed = True\n",
            "",
            "test_serving_hosts.py::test_texts_longer_than_any_hosts_pool",
        ),
        ("_Counts.moved", "            self.partial[target] = tokens\n", "            pass\n"),
        ("_Counts.moved", "self.refs[source], self.refs[target] = 0, ", "_, self.refs[target] = 0, "),
        (
            "_Counts.leave_free",
            "self.home, tuple(blocks))",
            "self.home)",
            "test_serving_hosts.py::test_the_digest_of_a_pool_is_of_its_blocks",
        ),
        ("HostedPool.check", "if noted != lending.debtors", "if False"),
    ),
    *group(
        "serving/peers.py",
        """
        test_serving_hosts.py::test_all_hear_all
        test_serving_hosts.py::test_one_that_does_not_come
        test_serving_hosts.py::test_a_device_that_never_answers
        test_serving_hosts.py::test_a_fault_of_one_ends_all
        test_serving_hosts.py::test_a_store_that_is_gone
        """,
        ("Peers.exchange", '        self._forget(f"exchange/{self._rounds - 1}/{self.number}")\n', ""),
        ("Peers.exchange", "        self._rounds += 1\n", ""),
        ("Peers._get", "            self._look(0.0)\n", ""),
        ("Peers.wait", "self._look(0.0)", "pass"),
        ("Peers.lose", "self._store.put(self._full(_NOBODY), why.encode())", "pass"),
        ("Peers._who", "int(at) < step", "int(at) <= step"),
        ("Peers._put", "            raise self._unreachable(error) from error\n", "            return\n"),
        ("Peers.meet", "!= each[0].get(what)", "!= other.get(what)", "test_serving_hosts.py::test_other_facts"),
    ),
    *group(
        "serving/together.py",
        """
        test_serving_hosts.py::test_all_processes_do_the_same
        test_serving_hosts.py::test_a_process_that_does_something_else
        test_serving_hosts.py::test_an_error_in_one_is_an_error_in_all
        """,
        ("Together.begin", 'request.state = "cancelled"', "pass"),
        ("Together.begin", "            raise self._broken\n", "            pass\n"),
        ("Together.end", "        self._step += 1\n", ""),
        ("Together.end", "        self._digest = digests.after(self._digest, digest)\n", ""),
        ("Together.cancel", "        return True\n", "        return False\n"),
        ("Together.error_of", "lost = self._peers.failed(error)", "lost = error"),
    ),
    *group(
        "serving/arrivals.py",
        "test_serving_hosts.py::test_messages",
        ("unpacked", "tuple(a.namespace) if isinstance(a.namespace, list) else a.namespace", "a.namespace"),
    ),
    *group(
        "serving/agreement.py",
        """
        test_serving_ledger.py::test_the_first_step_at_which_processes_differ
        test_serving_ledger.py::test_a_process_that_did_fewer_steps_differs
        test_serving_ledger.py::test_equal_processes_go_on
        test_serving_ledger.py::test_every_byte_of_a_digest_counts
        """,
        ("Agreement.compare", "self._compared + step, ", "step, "),
        ("Agreement.compare", "        self._noted.clear()\n", ""),
        ("Agreement.step", "self.every * DIGEST_BYTES", "(self.every + 1) * DIGEST_BYTES"),
        ("first_difference", "max(map(len", "min(map(len"),
        ("first_difference", "start + DIGEST_BYTES", "start + 1"),
    ),
    *group(
        "serving/counts.py",
        """
        test_serving_blocks.py::test_random_operations
        test_serving_bad_input.py::test_rows
        """,
        ("Counts.let_go", "                self.partial.pop(block, None)\n", ""),
        ("Counts.let_go", "if not self.refs[block]", "if self.refs[block] <= 1"),
        ("Counts.take", "        self.leave_free(blocks)\n", ""),
        ("Counts.take", "self.partial[blocks[-1]] = tail", "self.partial[blocks[0]] = tail"),
        ("Counts.take", "> self.peak", "> -1", "test_serving_blocks.py::test_usage"),
        ("Counts.filled", "if tokens < self.block_size", "if tokens <= self.block_size"),
        ("Counts.hold", "            self.refs[block] += 1\n", ""),
        ("Counts.hold", "            self.held[block] += 1\n", ""),
        ("Counts.holdable", "if not self.refs[block]", "if self.refs[block] < 0"),
        ("Counts.release", "            self.held[block] -= 1\n", "            pass\n"),
        ("Counts.releasable", "times > self.held[block]", "times > self.refs[block]"),
        ("Counts.releasable", "Counter(found)", "dict.fromkeys(found, 1)"),
        ("Counts.check", "refs != named[block] + held", "refs < 0", "test_serving_blocks.py::test_check_finds"),
        (
            "Counts.check",
            "sorted(self.all_free()) !=",
            "sorted(set(self.all_free())) !=",
            "test_serving_blocks.py::test_check_finds",
        ),
    ),
    *group(
        "serving/radix.py",
        """
        test_serving_radix.py::test_random_operations
        test_serving_radix.py::test_check_finds
        test_serving_bad_input.py::test_rows
        """,
        ("RadixTree.evict", "                wanted -= len(gone)\n            else", "            else"),
        ("RadixTree.evict", "self._cut_end(node, wanted)", "self._cut_end(node, node.num_pages)"),
        ("RadixTree.evict", "                self._prune(node)\n", ""),
        ("RadixTree.evictable", " - self._locked[group]", ""),
        ("RadixTree.match_prompt", "tokens[:-1]", "tokens"),
        ("RadixTree.match", "            self._touch(last)\n", ""),
        (
            "RadixTree.lock",
            "not node.alive or",
            "False or",
            "test_serving_radix.py::test_a_match_whose_pages_were_evicted_cannot_be_locked",
        ),
        (
            "RadixTree.lock",
            "node.end * self.page_size != match.length",
            "False",
            "test_serving_radix.py::test_a_match_whose_pages_were_evicted_cannot_be_locked",
        ),
        (
            "RadixTree.lock",
            "or self._lacks(node, match.pages)",
            "",
            "test_serving_radix.py::test_pages_of_a_locked_window_stay",
        ),
        ("RadixTree.lock", "each.locks == 1", "each.locks >= 1"),
        ("RadixTree.unlock", "                self._queue(each)\n", ""),
        ("RadixTree.unlock", "if not match._locks", "if match._locks < 0"),
        ("RadixTree._walk", "if not text.startswith(child.edge, at)", "if len(text) < at + len(child.edge)"),
        ("RadixTree._good", "if column[i] != NO_PAGE else 0", "if column[i] != NO_PAGE else runs[g]"),
        ("RadixTree._good", "(w - 1) // self.page_size", "w // self.page_size"),
        ("RadixTree._good", "min(need, at)", "need"),
        ("RadixTree._pages", "(window - 1), 0)", "window, 0)"),
        (
            "RadixTree._split",
            "        self._queue(upper)\n",
            "",
            "test_serving_radix.py::test_pages_of_a_locked_window_stay",
        ),
        ("RadixTree._touch", "for each in node.up()", "for each in [node]"),
        ("RadixTree._store", "            self._revive(last, taken)\n", "            pass\n"),
        ("RadixTree._store", "            self._touch(last)\n", "            pass\n"),
        ("RadixTree._store", "                self._queue(node)\n", "                pass\n"),
        ("RadixTree._takes", "NO_PAGE if had != NO_PAGE else page", "page"),
        ("RadixTree._takes", "if page in self._owned[group]", "if page < -1"),
        ("RadixTree._revive", "node.locks > 0", "0"),
        ("RadixTree._cut_end", "        self._disown(gone)\n", ""),
        ("RadixTree._cut_end", "column[::-1]", "column"),
        ("RadixTree._cut_end", "            self._queue(leaf)\n", "            pass\n"),
        ("RadixTree._cut_window", "        self._queue(node)\n", ""),
        ("RadixTree._cut_window", "and len(gone) < count", ""),
        ("RadixTree._remove", "            self._queue(above)\n", "            pass\n"),
        ("RadixTree._remove", "        leaf.alive = False\n", ""),
        (
            "RadixTree._remove",
            "            del self._roots[above.namespace]\n",
            "            pass\n",
            "test_serving_radix.py::test_nothing_piles_up",
        ),
        ("RadixTree._columns", "len(set(real)) != len(real)", "False"),
        ("RadixTree.check", "owned != self._owned or locked != self._locked", "locked != self._locked"),
    ),
    *group(
        "serving/nodes.py",
        """
        test_serving_radix.py::test_random_operations
        """,
        ("Node.split", "upper.locks = self.locks", "upper.locks = 0"),
        ("Node.split", "        self.start += pages\n", ""),
        ("Oldest.pop", "elif node.tick != tick", "elif node.tick < tick"),
        (
            "Oldest.push",
            "                self._room = 64 + 2 * len(self._heap)\n",
            "                self._room = 2 * self._room + 2 * len(self._heap)\n",
            "test_serving_radix.py::test_nothing_piles_up",
        ),
        ("common_pages", "low = middle", "low = middle - 1 or 1"),
    ),
    *group(
        "serving/checks.py",
        """
        test_serving_bad_input.py::test_rows
        """,
        ("namespace", "        return value\n", '        return "".join(value)\n'),
        ("_ints", "<= {int}", "<= {int, bool}"),
        ("integer", "isinstance(value, bool) or not", "not"),
    ),
    *group(
        "serving/groups.py",
        """
        test_serving_groups.py::test_lives_of_requests
        test_serving_groups.py::test_what_one_group_cannot_do_none_does
        test_serving_groups.py::test_windows_give_blocks_back_and_reuse_them
        test_serving_groups.py::test_gpt_oss_20b
        """,
        (
            "GroupedPool.pages",
            "table[:count]",
            "table",
            "test_serving_scheduler.py::test_who_comes_back_computes_less_than_a_page_again",
        ),
        ("LayerGroup.unseen", "length - self.window + 1", "length - self.window + 2"),
        ("LayerGroup.unseen", "length - self.window + 1", "length - 2 * self.window"),
        (
            "GroupedPool.append",
            "            pool.forget(seq, self._unseen(group, pool, seq, seen))\n",
            "            pass\n",
        ),
        ("GroupedPool.append", "if cost > gain + pool.num_free", "if cost > gain + pool.num_free + 1"),
        (
            "GroupedPool.append",
            "if cost > gain + pool.num_free",
            "if cost > pool.num_free",
            "test_serving_groups.py::test_what_a_window_leaves_behind_is_there_for_the_next_tokens",
        ),
        (
            "GroupedPool.allocate",
            "            pool.allocatable(seq, count, prefix=blocks, forgotten=forgotten)\n",
            "            pass\n",
        ),
        ("GroupedPool.hold", "            pool.holdable(each)\n", "            pass\n"),
        ("GroupedPool.release", "            pool.releasable(each)\n", "            pass\n"),
        (
            "GroupedPool.can_allocate",
            'return "never" if "never" in answers',
            'return "never" if "never" == answers[0]',
            "test_serving_groups.py::test_admission_asks_every_group",
        ),
        ("GroupedPool._split", "first * self.block_size", "0"),
        ("GroupedPool.one_table_bytes", "-(-checks", "(checks", "test_serving_groups.py::test_gpt_oss_20b"),
    ),
    *group(
        "serving/replay.py",
        """
        test_serving_replay.py::test_a_replay_is_the_rule
        test_serving_replay.py::test_the_last_block_may_be_short
        test_serving_replay.py::test_a_request_larger_than_the_pool_passes_through
        """,
        ("Replay.hit_rate", "/ self.prompt_tokens if", "/ max(self.ideal_tokens, 1) if"),
        ("replay", "_known(ids, held) * size, request.input_length", "_known(ids, held) * size, 10**9"),
        ("replay", "in reversed(ids)", "in ids"),
        ("replay", "            held.move_to_end(i)  # the", "            pass  # the"),
        ("replay", "ids = ids[-room:]", "ids = ids[:room]"),
        ("replay", "while room is not None and len(held) > room", "while room is not None and len(held) > room + 1"),
        ("replay", "evicted += before + new - len(held)", "evicted += before - len(held)"),
        ("_known", "            break\n", "            continue\n"),
        ("knee", "slope * point[0]", "0", "test_serving_replay.py::test_the_knee_of_two_lines_is_where_they_meet"),
    ),
    *group(
        "serving/trace.py",
        """
        test_serving_replay.py::test_a_malformed_line_is_an_error_with_its_number
        """,
        ("read_trace", "enumerate(lines, 1)", "enumerate(lines)"),
        ("_request", "len(set(ids)) != len(ids)", "False"),
        ("_request", "bool(ids) != ", "bool(ids) > "),
        ("_request", "type(i) is not int for i", "not isinstance(i, int) for i"),
    ),
    *group(
        "serving/kinds.py",
        """
        test_serving_tiers.py::test_nothing_that_differs_has_one_key
        """,
        ("parts", 'len(part).to_bytes(8, "little") + part', "part"),
        ("Kind.settings", '"policy", "page_size"', '"page_size"'),
        ("Kind.digest", "[*map(repr, self.settings.items()), *arrays]", "map(repr, self.settings.items())"),
    ),
    *group(
        "serving/records.py",
        """
        test_serving_tiers.py::test_nothing_that_differs_has_one_key
        test_serving_tiers.py::test_a_key_is_a_hash_of_kind_namespace_prefix_and_tokens
        test_serving_tiers.py::test_names_go_on_where_others_end
        test_serving_tiers.py::test_a_record_is_its_own
        """,
        ("_spelled", "*map(text_bytes, namespace)", 'text_bytes("".join(namespace))'),
        ("page_key", "parts(parent, text)", "parts(text)"),
        ("page_names", "        parent = key\n", ""),
        ("page_names", "names[-1].key if names else", ""),
        ("_owned", " and not given.flags.writeable", ""),
        ("_owned", "given.flags.owndata and ", ""),
    ),
    *group(
        "serving/encoding.py",
        """
        test_serving_tiers_disk.py::test_rows
        """,
        (
            "decode",
            "!= view[-CHECKSUM_BYTES:]",
            '== b""',
            "test_serving_tiers.py::test_every_flipped_bit_and_every_cut_is_seen",
        ),
        ("decode", "version != FORMAT", "version > FORMAT + 1"),
        ("decode", "    _check_kind(table", "    0 and _check_kind(table"),
        ("check_lengths", "stated != size", "stated > size"),
        ("check_lengths", " or table_bytes > MAX_TABLE_BYTES", ""),
        ("_check_name", '        "tokens": list(name.tokens),\n', ""),
        ("_check_name", '        "parent": name.parent.hex(),\n', ""),
        ("_check_name", '        "namespace": namespace_digest(name.namespace).hex(),\n', ""),
        ("_check_layout", "(spec.axes, ", '(entry["axes"], '),
        ("_entries", 'entry["offset"] != end or ', ""),
        ("_entries", ' or entry["size"] != size', ""),
        ("_entries", "if name in names", "if False"),
        ("_parsed", "len(found) != len(pairs)", "False"),
        ("_parsed", ", RecursionError", ""),
    ),
    *group(
        "serving/files.py",
        """
        test_serving_tiers_disk.py::test_what_is_written_in_which_order
        test_serving_tiers_disk.py::test_only_the_user_may_read
        test_serving_tiers_disk.py::test_what_dead_processes_left_is_cleared_away
        test_serving_tiers_disk.py::test_rows
        test_serving_tiers_disk.py::test_every_call_fails_once
        """,
        ("Directory.write", "                os.fsync(fd)\n", ""),
        ("Directory.write", "                os.fsync(self._fd)\n", ""),
        (
            "Directory.write",
            """                os.fsync(fd)
                left.append(name)
                os.rename(temporary, name, src_dir_fd=self._fd, dst_dir_fd=self._fd)
""",
            """                left.append(name)
                os.rename(temporary, name, src_dir_fd=self._fd, dst_dir_fd=self._fd)
                os.fsync(fd)
""",
        ),
        ("Directory.write", "0o600", "0o644"),
        ("Directory.write", "rest = rest[count:]", "break"),
        ("Directory.write", "                left.append(name)\n", ""),
        ("Directory.__init__", "0o700", "0o755"),
        ("Directory.__init__", "if mode & stat.S_IWOTH", "if mode & stat.S_IXOTH & stat.S_IWOTH"),
        ("Directory.__init__", '".." in self.path.parts', "False"),
        ("Directory._clear", "fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass"),
        ("Directory._clear", "            os.unlink(name, dir_fd=self._fd)\n", ""),
        (
            "Directory.entries",
            "in sorted(found)",
            "in found[::-1]",
            "test_serving_tiers_disk.py::test_what_was_used_longest_ago_leaves_first_after_a_restart",
        ),
        ("", "DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW", "DIRECTORY = os.O_RDONLY | os.O_DIRECTORY"),
        ("", "READ = os.O_RDONLY | os.O_NOFOLLOW", "READ = os.O_RDONLY"),
    ),
    *group(
        "serving/tiers.py",
        """
        test_serving_tiers.py::test_host_memory_is_a_list_by_use
        test_serving_tiers.py::test_keys_that_collide_are_a_miss
        """,
        (
            "LeastRecent.add",
            "while self.nbytes > self.max_bytes",
            "while self.nbytes >= self.max_bytes",
            "test_serving_tiers.py::test_a_tier_may_be_full",
        ),
        (
            "LeastRecent.add",
            "        if size > self.max_bytes:\n            return [key]\n",
            "",
            "test_serving_tiers_disk.py::test_what_was_used_longest_ago_leaves_first_after_a_restart",
        ),
        ("LeastRecent.remove", "self.nbytes -= self._sizes.pop(key, 0)", "self._sizes.pop(key, 0)"),
        ("HostTier.get", "record is None or record.name != name", "record is None"),
        ("HostTier.get", "        self._recent.touch(name.key)\n", ""),
        ("HostTier.put", "            self._recent.touch(key)\n", ""),
    ),
    *group(
        "policies/chunked.py",
        "test_chunked.py",
        (
            "Chunked.positions",
            "position <= last",
            "position < last",
            "test_chunked.py::test_trimmed_as_if_nothing_had_come",
        ),
        ("Chunked.can_trim", " | (left == 0)", "", "test_chunked.py::test_trimmed_as_if_nothing_had_come"),
        (
            "Chunked.can_trim",
            "self._start(left - 1)",
            "self._start(left)",
            "test_chunked.py::test_trimmed_as_if_nothing_had_come",
        ),
        (
            "Chunked._start",
            "position % self._counted",
            "0 * position",
            "test_chunked.py::test_trimmed_as_if_nothing_had_come",
        ),
    ),
    *group(
        "serving/below.py",
        """
        test_serving_hosts.py::test_tiers_of_processes_give_what_all_have
        test_serving_hosts.py::test_tiers_of_processes_with_windows
        """,
        ("Below.load", "if self._exchange is not None:", "if False:"),
        ("Below.leaves", "if any(anybody)", "if all(anybody)"),
        ("Below._everywhere", "all(each) for each", "any(each) for each"),
        ("Below._everywhere", "return usable(found)", "return found"),
        ("Below._everywhere", "if there[specs[name].group]", "if True"),
    ),
    *group(
        "serving/contents.py",
        "test_serving_hosts.py::test_what_pages_of_hosts_hold",
        ("taken", "(whole,) * len(specs(cache))", "(None,) * len(specs(cache))"),
        ("_put_back", "jnp.where(which < 0, group.num_pages, which)", "which"),
        ("put_back", "shardings_of(cache)", "(None,) * len(shardings_of(cache))"),
    ),
    *group(
        "serving/stack.py",
        """
        test_serving_tiers.py::test_what_falls_out_of_one_tier_sinks_to_the_next
        test_serving_tiers.py::test_a_stack_of_host_and_disk_against_a_plain_one
        test_serving_tiers.py::test_a_hit_has_what_every_window_sees
        test_serving_tiers.py::test_flush_brings_all_to_the_disk
        """,
        ("Tiers.store", "reversed(list(records))", "list(records)"),
        ("Tiers.touch", "reversed(names)", "names"),
        ("Tiers.load", "        self.store(found)\n", ""),
        (
            "Tiers.load",
            "                break\n",
            "                continue\n",
            "test_serving_tiers.py::test_a_text_is_found_up_to_its_first_gap",
        ),
        ("Tiers.flush", "self._put(record, level + 1)", "self._put(record, level)"),
        ("usable", "if record.has(g) else 0", "if record.has(g) else run"),
        ("usable", "-(-(window - 1) // kind.page_size)", "(window - 1) // kind.page_size"),
    ),
    *group(
        "serving/workers.py",
        """
        test_serving_tiers_disk.py::test_rows
        test_serving_tiers_disk.py::test_what_waits_is_found
        """,
        ("Timed.call", "not self._last.done()", "False"),
        (
            "Worker._run",
            "                        self._is_running = False\n",
            "",
            "test_serving_tiers.py::test_a_thread_comes_back_when_there_is_something_to_do",
        ),
        (
            "Worker.submit",
            "            self._run(0)\n",
            "            pass\n",
            "test_serving_tiers_disk.py::test_where_no_thread_can_be_started",
        ),
    ),
    *group(
        "serving/disk.py",
        """
        test_serving_tiers_disk.py::test_what_waits_is_found
        test_serving_tiers_disk.py::test_what_leaves_while_it_waits_comes_back
        test_serving_tiers_disk.py::test_a_queue_that_is_full
        test_serving_tiers_disk.py::test_rows
        test_serving_tiers.py::test_a_disk_is_the_same_list
        """,
        ("DiskTier._write", "self._waiting.get(key) is entry", "key in self._waiting"),
        ("DiskTier._write", "                    self._recent.remove(key)\n", "                    pass\n"),
        ("DiskTier._write", "                self._queued -= size\n", ""),
        ("DiskTier._queue", "not self._queued or ", ""),
        ("DiskTier._queue", "self._queued + size <= self.queue_bytes", "True"),
        ("DiskTier._delete", "            self._waiting.pop(key, None)\n", ""),
        ("DiskTier.get", "            self.remove(name.key)\n", "            pass\n"),
        ("DiskTier.get", "if error.errno != errno.EBUSY else", "if error.errno else"),
        ("DiskTier.get", "        self.touch(name.key)\n", "", "test_serving_tiers.py::test_a_disk_is_the_same_list"),
        (
            "DiskTier.read",
            "if waiting[0].name != name",
            "if False",
            "test_serving_tiers.py::test_keys_that_collide_are_a_miss",
        ),
        (
            "DiskTier._queue",
            "0 if self._is_stuck else self.deadline",
            "self.deadline",
            "test_serving_tiers_disk.py::test_a_disk_that_has_stopped_is_waited_for_once",
        ),
        (
            "DiskTier._queue",
            "                self.remove(key)\n",
            "                pass\n",
            "test_serving_tiers.py::test_a_record_with_more_groups_takes_the_place_of_one_with_fewer",
        ),
        ("DiskTier.flush", ".result()", ""),
        (
            "DiskTier.__init__",
            "daemon=False",
            "daemon=True",
            "test_serving_tiers_disk.py::test_written_when_the_process_ends",
        ),
    ),
    *group(
        "serving/scheduler.py",
        "test_serving_scheduler.py",
        ("Scheduler._first", "by_rank[0].passed >= PATIENCE", "by_rank[0].passed > 10**9"),
        ("Scheduler._appended", "prefill.tokens[: prefill.done]", "prefill.tokens[: prefill.start]"),
        ("Scheduler._appended", "prefill.tokens[: prefill.done]", "prefill.tokens"),
        ("Scheduler._leave", "            if keep:\n", "            if False:\n"),
        ("Scheduler._first", "key = -job.priority, -known", "key = -job.priority, known"),
        ("Scheduler._first", "and not self._comes_soon(job, known)", ""),
        ("Scheduler._comes_soon", "if other.namespace == job.namespace", "if True"),
        (
            "Scheduler._comes_soon",
            "prefill.start < more <= len(prefill.tokens)",
            "more <= len(prefill.tokens)",
            "",
            "what is found already reaches as far as `start` for every prompt that begins alike",
        ),
        ("Scheduler._appended", "or is_over", ""),
        ("Scheduler._appended", "sequence.num_drawn - 1", "sequence.num_drawn"),
        ("Scheduler._room", "self.pool.length(sequence), 0)", "0, 0)"),
        ("Scheduler._room", "seen=appended", "seen=None"),
        ("Scheduler._leave", "self.pool.close(sequence)", "pass"),
        ("Scheduler._let_in", "pool.close(prefill.text)", "pass"),
        ("Scheduler._finish_reading", "- len(job.prompt) + 1", "- len(job.prompt)"),
        ("Scheduler._read", "start // self._chunk * self._chunk + self._chunk", "start + self._chunk"),
        ("Scheduler._grow", "sequence.num_drawn < job.limit", "sequence.num_drawn <= job.limit"),
        ("Scheduler._admit", "other.passed += 1", "pass"),
    ),
    *group(
        "serving/prefixes.py",
        "test_serving_scheduler.py",
        ("PrefixPool.open", "n + r for n, r", "n for n, r"),
        ("PrefixPool.open", "self.tree.unlock(match)", "pass"),
        ("PrefixPool.open", "pool.forget(seq, group.unseen(found))", "pass"),
        ("PrefixPool.keep", "self.tree.unlock(old)", "pass"),
        ("PrefixPool.keep", "self.tree.lock(match)", "pass"),
        ("PrefixPool.fork", "self.tree.lock(self._matches[child])", "pass"),
        ("PrefixPool._at_first", "(start // self._chunk + 1) * self._chunk", "start + self._chunk"),
        ("PrefixPool._make_room", "n + p - pool.num_free", "n - pool.num_free"),
        ("PrefixPool._evict", "self.pool.release(gone)", "pass"),
    ),
    *group(
        "serving/engine.py",
        "test_serving_scheduler.py",
        ("Engine._collect", "index != len(sequence.new)", "False"),
        ("Engine._collect", "job.owner.is_over", "False"),
        (
            "Engine._sweep",
            'keep=job.owner.state != "failed"',
            "keep=True",
            "test_serving_scheduler.py::test_what_was_not_written_is_no_prefix",
        ),
        ("Engine._take", "request.cancel()", "pass"),
        (
            "Engine.stats",
            "self._seconds - self._device_seconds",
            "self._seconds",
            "test_serving_engine.py::test_tokens_are_those_of_each_alone",
        ),
        ("Engine.step", "keep = 1 if tick and not self._speculate else 0", "keep = 1 if tick else 0"),
    ),
    *group(
        "cli/bench_engine.py",
        "test_cli.py::test_what_an_engine_is_measured_by",
        ("measured", "max(pages, stats.pages)", "stats.pages"),
        ("measured", "prefix_cache=keeps_prefixes", "prefix_cache=True"),
        ("measured", "[*tokens, *request.tokens[0]]", "[*tokens, *request.tokens[0][1:]]"),
        ("Chat.num_new", "self.turns * self.new", "self.new"),
    ),
    *group(
        "serving/tables.py",
        "test_serving_scheduler.py::test_tables_of_rows_are_those_of_their_texts",
        ("RowTables.of", " or text in changed", ""),
        ("RowTables.of", "text is not self._texts[row] or ", ""),
        ("RowTables.of", "table[rows] = NO_BLOCK", "pass"),
        ("RowTables.of", "np.array(table)", "table"),
        ("RowTables.of", "        if rows:\n", "        if True:\n"),
    ),
    *group(
        "serving/limits.py",
        "test_serving_scheduler.py::test_refused_at_submit",
        ("room", "length > max_length", "length > max_length + 1"),
    ),
    *group(
        "serving/searching.py",
        "test_serving_scheduler.py::test_beams",
        ("_move", "source[child.row] = parents[i].row", "pass"),
        ("_move", "scheduler.finish(job, parent, keep=False)", "pass"),
        ("search_on", "len(going[0].tokens) < job.limit", "len(going[0].tokens) <= job.limit"),
    ),
    *group(
        "serving/beams.py",
        "test_serving_scheduler.py::test_one_beam_more_with_ended_ones\ntest_serving_scheduler.py::test_beams",
        ("grown", "score = beam.score + logprob", "score = logprob"),
        ("grown", "for beam in ended]", "for beam in ended[:0]]"),
        ("grown", "[:width]  # stable", "[: width + 1]"),
    ),
    *group(
        "serving/drafts.py",
        """
        test_serving_scheduler.py::test_what_repeats_itself_goes_on
        test_serving_scheduler.py::test_guesses_change_nothing
        """,
        (
            "Guesses.guess",
            "text.num_drawn - 1)",
            "text.num_drawn)",
            "test_serving_scheduler.py::test_no_more_is_guessed_than_is_wanted",
        ),
        ("Lookup.push", "] = end", "] = end - 1"),
        ("Lookup.guess", "start : start + count", "start + 1 : start + count"),
        ("Lookup.guess", "itertools.cycle(self._text[start : start + count])", "self._text[start : start + count]"),
        ("Lookup.push", "self.guess(1) == [token]", "True"),
    ),
    *group(
        "serving/device.py",
        "test_serving_engine.py",
        ("_compiled.read", "jnp.where(pieces.fresh, 0, x.status)", "x.status"),
        (
            "_compiled.step",
            "rows.running & goes",
            "goes",
            "test_serving_engine.py::test_samples_that_stop_and_give_way",
        ),
        ("_compiled.verify", "layer.trim(num_new - used)", "layer"),
    ),
    *group(
        "serving/pieces.py",
        "test_serving_engine.py",
        ("pieces_of", "piece.start == prefill.start", "False"),
        (
            "_goes_on",
            "text.num_drawn - 1\n",
            "0\n",
            "test_serving_engine.py::test_samples_that_stop_and_give_way",
        ),
    ),
    *group(
        "serving/reads.py",
        "test_serving_scheduler.py::test_rows_read_what_they_share_together",
        (
            "SharedReads.of",
            "text.num_drawn - 2",
            "text.num_drawn + 9",
            "",
            "pages that several rows name are full: a tail that is shared is copied before anybody steps",
        ),
    ),
    *group(
        "cache/rows.py",
        "test_serving_engine.py::test_samples_are_the_rows_of_generate",
        ("_joined.one", "jnp.where(moved, jnp.take(new", "jnp.where(~moved, jnp.take(new"),
    ),
    # Values in keys, latent attention ------------------------------------------------------------------------------
    *group(
        "positions/rope.py",
        """
        test_values_in_keys.py::test_rope_that_begins_behind
        test_values_in_keys.py::test_where_rope_cannot_begin
        """,
        ("_turned", "rope.rotary_begin + 2 * rope.num_pairs", "2 * rope.num_pairs"),
        ("_turned", "x[..., :begin], turned, x[..., end:]", "x[..., end:], turned, x[..., :begin]"),
        ("RoPE.__post_init__", "<= head_dim - begin:", "<= head_dim:"),
        (
            "RoPE.behind",
            "rotary_begin=self.rotary_begin + features",
            "rotary_begin=self.rotary_begin",
            "test_layers_latent.py::test_a_cache_gives_the_same",
        ),
    ),
    *group(
        "cache/view.py",
        "test_values_in_keys.py::test_codecs",
        ("View.dense", "keys[..., :size]", "keys[..., -size:]"),
    ),
    *group(
        "attend/reference.py",
        "test_values_in_keys.py::test_gradients_pass_straight_through_codes",
        ("dense", "if view.values_in_keys:", "if not view.values_in_keys:"),
    ),
    *group(
        "codecs/base.py",
        "test_values_in_keys.py::test_blocks_of_any_layout",
        ("Codec.as_values", "transposed and n not in", "transposed or n in"),
    ),
    *group(
        "cache/layout.py",
        "test_values_in_keys.py::test_a_layout_that_is_read_twice",
        ("Layout.best", "rows, not values_in_keys)", "rows, True)"),
    ),
    *group(
        "cache/base.py",
        """
        test_values_in_keys.py::test_refused
        test_values_in_keys.py::test_bytes_of_a_token
        """,
        ("values_apart", "value_head_dim > head_dim", "value_head_dim > 2 * head_dim"),
        ("values_apart", "not codec.stores_alike", "codec.rows is None and not codec.stores_alike"),
        ("values_apart", "return not values_in_keys", "return True"),
    ),
    *group(
        "cache/groups.py",
        "test_values_in_keys.py::test_pools_that_differ_in_it_are_groups_of_their_own",
        ("groups_of", "cache.value_head_dim, cache.values_in_keys)", "cache.value_head_dim)"),
    ),
    *group(
        "attend/prepare.py",
        "test_values_in_keys.py::test_refused",
        ("prepared", "rope.rotary_begin < cache.value_head_dim", "rope.rotary_begin > cache.value_head_dim"),
        ("_keys_and_values", "(key is None or value is not None)", "key is None"),
        ("_keys_and_values", "(value is None and not cache.values_in_keys)", "False"),
    ),
    *group(
        "attend/api.py",
        "test_values_in_keys.py::test_kernels_refuse_by_name_and_xla_reads",
        ("_refusal", "request.view.values_in_keys and not", "False and not"),
    ),
    *group(
        "memory/formula.py",
        "test_values_in_keys.py::test_bytes_of_a_token",
        ("storage", 'del sizes["values"]', "pass"),
        (
            "storage",
            '"values": value_head_dim or head_dim',
            '"values": head_dim',
            "test_memory.py::test_values_of_another_size",
        ),
    ),
    *group(
        "layers/latent.py",
        """
        test_layers_latent.py::test_full_sequences
        test_layers_latent.py::test_a_cache_gives_the_same
        test_layers_latent.py::test_refused
        """,
        ("checked", "1 / math.sqrt(sizes.query)", "1 / math.sqrt(sizes.cached)"),
        ("_rope", "rope.rotary_begin - sizes.latent + before", "0"),
        ("absorbed", "[latent, shared.astype(latent.dtype)]", "[shared.astype(latent.dtype), latent]"),
        ("to_heads", "[plain, shared.astype(plain.dtype)]", "[shared.astype(plain.dtype), plain]"),
        ("check_cache", "cache.is_static or not cache.values_in_keys", "cache.is_static"),
        ("materialised", "head_dim=sizes.query", "head_dim=sizes.cached", "", "full sequences go by their arrays"),
    ),
    *group(
        "layers/latent_attention.py",
        "test_layers_latent.py::test_a_cache_gives_the_same",
        ("MultiHeadLatentAttention._latents", "latent.normed(self.kv_norm, down[..., :size])", "down[..., :size]"),
        ("MultiHeadLatentAttention._queries", "latent.normed(self.query_norm, down)", "down"),
    ),
    *group(
        "layers/linen_latent.py",
        """
        test_layers_latent.py::test_the_linen_twin
        test_layers_latent.py::test_dropout_and_weights
        """,
        ("MultiHeadLatentAttention._norm", "epsilon=self.norm_epsilon", "epsilon=1e-1"),
        ("MultiHeadLatentAttention.__call__", "linen_parts.Sowing(self) if sow_weights else None", "None"),
    ),
    *group(
        "layers/placement.py",
        "test_layers_latent.py::test_on_a_mesh",
        ("latent_metadata", "(None, heads, None)", "(None, None, None)"),
        ("heads_as", "heads[1], None)", "None, None)"),
    ),
    *group(
        "families/config.py",
        """
        test_experts.py::test_groups_are_checked
        test_models_latent.py::test_settings_are_checked_together
        """,
        ("DecoderConfig._check_groups", "if rest or not self.num_experts", "if rest"),
        (
            "DecoderConfig._check_groups",
            "self.experts_per_token > taken * size",
            "self.experts_per_token > groups * size",
        ),
        ("DecoderConfig._check_groups", "best > size", "best > self.num_experts"),
        ("DecoderConfig._latent_head", "value not in (None, only)", "False"),
        ("DecoderConfig._check_latent", "self.qkv_bias != self.out_bias", "False"),
    ),
    *group(
        "families/per_layer.py",
        "test_models_latent.py::test_settings_are_checked_together",
        ("PerLayer.is_latent", '(*LATENT, "q_lora_rank")', "LATENT"),
    ),
    *group(
        "models/block.py",
        """
        test_models_latent.py::test_chunks
        test_models_latent.py::test_bytes_and_refusals
        """,
        ("attention_of", "norm_epsilon=config.latent_norm_epsilon", "norm_epsilon=config.norm_epsilon"),
        ("attention_of", '"scale": config.layer_scales[layer]', '"scale": None'),
        ("attention_of", '"softcap": config.softcap', '"softcap": None'),
        ("attention_of", '"window": config.layer_windows[layer]', '"window": None'),
        ("attention_of", "q_lora_rank=config.q_lora_rank", "q_lora_rank=None"),
        ("attention_of", "use_bias=config.qkv_bias,\n            **options", "**options"),
        ("attention_of", "attention_fn is not default_attention", "False"),
    ),
    *group(
        "models/convert.py",
        "test_models_latent.py::test_bytes_and_refusals",
        ("_refuse_latent", '("kv_down", "kernel")', '("key", "kernel")'),
    ),
    *group(
        "families/fp8.py",
        "test_fp8.py",
        ("expanded", "scale[columns][None]", "scale[columns * 0][None]"),
        ("expanded", 'side="right"', 'side="left"'),
        ("BlockScaled._floats", "along // size", "along // (size + 1)"),
        ("BlockScaled.kinds", '("F8_E4M3",) if name in self.scaled else FLOATS', "FLOATS"),
        ("_scaled", "-(-size // along)", "size // along"),
        ("_scaled", "not (kept and kept.search(name.removesuffix(_ENDING)))", "True"),
        ("_scaled", "made.endswith(_WHOLE)", "made.endswith(_WHOLE[:3])"),
        ("_checked", "value is not None and value not in known", "False"),
        ("_checked", "block is None", "False"),
        ("_checked", r'rf"(^|\.){re.escape(name)}(\.|$)"', 'rf"^{re.escape(name)}$"'),
    ),
    *group(
        "models/tensors.py",
        "test_fp8.py::test_blocks_that_do_not_divide",
        ("_mapped", "8 + length + start", "length + start"),
    ),
    *group(
        "families/latent.py",
        "test_checkpoints.py::test_published_configs",
        ("params", "low * (d + 1 + queries)", "low * (d + queries)"),
        ("params", "(d + bias) * (rank + rotary) + rank +", "(d + bias) * (rank + rotary) +"),
        ("cached", 'rank(f) + f.size("qk_rope_head_dim")', "rank(f)"),
        ("one_head", "return 1", "return heads"),
    ),
    *group(
        "families/hf/deepseek.py",
        "test_checkpoints.py::test_published_configs",
        ("_params", "f.num_experts * (d + (f.family.blueprint is _v3))", "f.num_experts * d"),
        ("_params", "bool(shared) * ", "", "test_checkpoints.py::test_which_layers_of_deepseek_have_experts"),
        ("_experts", "i % every == 0", "True", "test_checkpoints.py::test_which_layers_of_deepseek_have_experts"),
    ),
    *group(
        "memory/hf_quantized.py",
        "test_memory.py::test_fp8_in_blocks",
        ("in_blocks", "return numbers, 4 * scales", "return numbers, scales"),
    ),
    *group(
        "memory/specs.py",
        "test_memory.py::test_fp8_in_blocks",
        ("ModelSpec.weight_bytes", "if dtype == self.weight_dtype else 0", "if False else 0"),
        ("ModelSpec.touched_bytes", "/ 8 + scales)", "/ 8)"),
    ),
    *group(
        "sharding/choose.py",
        "test_sharding_placing.py::test_one_array_where_values_are_in_keys",
        ("explain", "0 if values_in_keys else value_head_dim", "value_head_dim"),
        ("explain", "and value_head_dim > head_dim", "and False"),
    ),
    *group(
        "cli/memory_tables.py",
        "test_cli.py::test_memory_of_latents",
        ("bytes_of_token", '"values_in_keys": spec.values_in_keys', '"values_in_keys": False'),
    ),
    *group(
        "families/latent.py",
        """
        test_pretrained.py::test_whole_prompts[deepseek_v2]
        test_pretrained.py::test_whole_prompts[deepseek_v3]
        """,
        ("scale", "magnitude**2", "magnitude"),
        ("scale", "0.1 * weight", "0.1"),
        ("attention", "{2: plain + value}", "{2: plain}"),
        ("attention", "range(plain, plain + value)", "range(value)"),
    ),
    *group(
        "families/hf/deepseek.py",
        """
        test_pretrained.py::test_whole_prompts[deepseek_v3]
        test_checkpoints.py::test_layers_that_guess_are_left_alone
        test_pretrained.py::test_whole_prompts[deepseek_v2]
        """,
        ("_v3", '"group_best": 2', '"group_best": 1'),
        ("_v3", 'rope_interleaved=fields.flag("rope_interleave")', "rope_interleaved=False"),
        ("_v2", "rope_interleaved=True", "rope_interleaved=False"),
        ("_v2", '{"expert_shares": "all"}', "{}"),
        ("_predicting", "config.num_layers + i", "config.num_layers + i + 1"),
    ),
    *group(
        "families/hf/minicpm3.py",
        "test_pretrained.py::test_whole_prompts[minicpm3]",
        ("_blueprint", "/ math.sqrt(sizes", "* math.sqrt(sizes"),
        ("_blueprint", 'embedding_scale=fields.positive("scale_emb")', "embedding_scale=None"),
    ),
    *group(
        "families/rules.py",
        "test_pretrained.py::test_whole_prompts[deepseek_v2]",
        ("Layout.within", "self.sizes.get(axis, self.shape[axis])", "self.shape[axis]"),
    ),
    *group(
        "positions/relative.py",
        """
        test_relative_bias.py::test_buckets
        test_relative_bias.py::test_tables
        """,
        ("RelativeBuckets._table", "self._each_way - 1)", "self._each_way)"),
        ("RelativeBuckets._table", "distance < exact", "distance <= exact", "", "the first wide bucket begins there"),
        ("RelativeBuckets._table", "- exact)\n", "- exact - 1)\n"),
        ("RelativeBuckets.of", "distance < 0, ahead, past", "distance <= 0, ahead, past"),
        ("RelativeBuckets.of", " + self._each_way", ""),
        ("RelativeBuckets.by_distance", "self.max_distance + 1", "self.max_distance"),
        ("RelativeBuckets.between", "query[:, None] - key[None, :]", "key[None, :] - query[:, None]"),
    ),
    *group(
        "attend/request.py",
        "test_relative_bias.py::test_a_step",
        ("_along", "by_distance.shape[-1] - 1", "by_distance.shape[-1] - 2"),
        ("_along", "jnp.clip(distance, 0,", "jnp.clip(distance - 1, 0,"),
        (
            "adjust",
            "relative.astype(scores.dtype).reshape(kv_heads, group, -1)",
            "relative.astype(scores.dtype)[::-1].reshape(kv_heads, group, -1)",
        ),
    ),
    *group(
        "positions/temperature.py",
        """
        test_temperature_and_gates.py::test_the_factor
        test_temperature_and_gates.py::test_a_step
        """,
        ("Temperature.__call__", "jnp.float32) + 1)", "jnp.float32))"),
        ("Temperature.__call__", "* self.scale + 1", "* self.scale"),
        (
            "Temperature.warmed",
            "query.astype(wide) * factor",
            "query.astype(wide) * factor.astype(query.dtype).astype(wide)",
        ),
    ),
    *group(
        "attend/step.py",
        "test_temperature_and_gates.py::test_a_step",
        (
            "_located",
            "step.rules.warmed(new.query, first[:, None] + t)",
            "step.rules.warmed(new.query, seen_at)",
        ),
        (
            "_located",
            "from_sinks = count, rotated(query, positions)",
            "from_sinks = count, rotated(new.query, positions)",
        ),
    ),
    *group(
        "layers/attention.py",
        "test_temperature_and_gates.py::test_layers",
        ("MultiHeadAttention._outputs", "if self.gate is not None:", "if False:"),
        ("MultiHeadAttention.__call__", "query = warm(settings.temperature, query, input_positions)", "pass"),
        (
            "MultiHeadAttention.__call__",
            "bias = biases.of_full(settings, self._relative_bias, query, key)",
            "pass",
            "test_relative_bias.py::test_layers",
        ),
    ),
    *group(
        "layers/decode.py",
        """
        test_temperature_and_gates.py::test_layers
        test_relative_bias.py::test_layers
        """,
        ("extend", "query = warm(settings.temperature, query, rotate_at)", "pass"),
        ("extend", "taken[:, None] - slots[None, :]", "slots[None, :] - taken[:, None]"),
    ),
    *group(
        "layers/biases.py",
        """
        test_layers_nnx.py::test_positions_mean_the_same_in_flax_cache
        test_relative_bias.py::test_layers
        """,
        ("of_all", "-slopes[:, None, None]", "slopes[:, None, None]"),
        ("of_all", "bias + alibi", "alibi"),
        ("of_full", "at[:, None] - of[None, :]", "of[None, :] - at[:, None]"),
    ),
    *group(
        "models/experts.py",
        """
        test_pretrained.py::test_planted_faults_are_found[what experts are given]
        test_pretrained.py::test_whole_prompts[llama4_plain]
        """,
        ("_Blocks.of_choices", ".at[self.place].set(x)", ".at[: x.shape[0]].set(x)"),
    ),
    *group(
        "families/hf/llama4.py",
        """
        test_pretrained.py::test_whole_prompts[llama4]
        test_checkpoints.py::test_published_configs
        """,
        (
            "_params",
            "experts = f.num_experts * (expert_weights(f) + d) + expert_weights(f)",
            "experts = f.num_experts * (expert_weights(f) + d)",
        ),
        ("_temperature", "if on else None", ""),
        ("_experts", '"expert_weighs": "input"', '"expert_weighs": "output"'),
        ("_is_sparse", "(layer + 1) % every", "layer % every"),
    ),
    # The target decides, not the host --------------------------------------------------------------------------------
    *group(
        "_target.py",
        """
        test_target.py::test_the_mesh_and_the_default_device_say_it
        test_target.py::test_exported_on_a_cpu
        test_target.py::test_arguments_on_a_mesh_say_it
        """,
        ("ambient", "device = jax.sharding.get_abstract_mesh().abstract_device", "device = None"),
        ("current", "_NAMED.get() or ambient()", "ambient()"),
        ("of_arrays", "if device is not None:", "if False:"),
        ("_canonical", 'else "cuda"', 'else "gpu"'),
        (
            "_named",
            "if isinstance(what, AbstractMesh) and what.abstract_device is not None:",
            "if False:",
            "test_target.py::test_sharded_caches",
        ),
        ("checked", "given in PLATFORMS", "True", "test_target.py::test_a_platform_that_is_named"),
    ),
    *group(
        "attend/api.py",
        """
        test_target.py::test_exported_on_a_cpu
        test_target.py::test_arguments_on_a_mesh_say_it
        test_target.py::test_elsewhere_it_works_all_the_same
        """,
        ("_find", "may_wait and record.is_bound() and implementation is None", "False"),
        ("_find", "            if may_wait:", "            if False:"),
        ("_find", "_target.of_arrays(view.keys) or", ""),
        ("writer", "kernels.setdefault(str(record.platform), kernel)", "pass"),
        ("attend", "if found.name is None:\n        default =", "if False:\n        default ="),
        ("_runs_on", "is_made_for(record, platform) or", "True or"),
    ),
    *group(
        "attend/late.py",
        """
        test_target.py::test_exported_on_a_cpu
        test_target.py::test_inside_a_shard_map
        test_target.py::test_derivatives_and_rows_mapped_over
        """,
        (
            "by_platform",
            "_manual.alike((*aimed.values(), default), *operands)",
            "(*aimed.values(), default)",
            "test_target.py::test_branches_in_a_shard_map",
        ),
        ("_lower", "raise UnsupportedError(message)", "return [x]"),
    ),
    *group(
        "attend/step.py",
        "test_target.py::test_arguments_on_a_mesh_say_it",
        ("Step.__call__", "cache.platform or _target.of_arrays(cache.keys)", "cache.platform"),
    ),
    *group(
        "attend/page_sizes.py",
        """
        test_target.py::test_the_smallest_pages_that_every_kernel_takes
        """,
        ("smallest", "taking[size]", "-size"),
        ("smallest", "_target.aimed_at(platform)", "_target.aimed_at(None)"),
    ),
    *group(
        "models/decoder.py",
        "test_target.py::test_layers_of_a_model_have_pages_of_one_size",
        ("Decoder.make_paged_cache", "max(free)", "min(free)"),
    ),
    *group(
        "codecs/float8.py",
        "test_target.py::test_elsewhere_it_works_all_the_same",
        ("Float8.write", 'encoded["data"].dtype != stored', "False"),
    ),
    *group(
        "pallas/interpreter.py",
        "test_target.py::test_interpreters_that_jax_forces",
        ("interpreted", "platform in (None, mode)", "True"),
        ("forced", '"GPU" in type(mode).__name__', "False"),
    ),
    *group(
        "pallas/kernels.py",
        "test_target.py::test_interpreters_that_jax_forces",
        ("_blocked", "not in (None, platform)", "in ()"),
    ),
    *group(
        "cache/base.py",
        "test_target.py::test_check_says_once_what_a_move_costs",
        ("Cache.check", "_WARNED.add(cost)", "pass"),
        ("Cache._cost_of_moving", '("cpu" if in_blocks else None)', "None"),
    ),
    *group(
        "sharding/cache.py",
        "test_target.py::test_sharded_caches",
        ("arrange", "cache.platform or mesh", "cache.platform"),
        ("arrange", "cache.platform or mesh", "mesh"),
    ),
    *group(
        "layers/caching.py",
        "test_target.py::test_sharded_caches\ntest_target.py::test_layers_and_models_pass_it_on",
        ("_placed.arranged", "_target.aimed_at(settings.mesh)", "_target.aimed_at(None)"),
    ),
    *group(
        "cache/pages.py",
        """
        test_blocks.py::test_tokens_side_by_side
        test_blocks.py::test_where_tokens_lie_side_by_side
        """,
        ("Pages._gather", "swapaxes(3, 4)", "swapaxes(3, 4)[:, :, :, ::-1]"),
        ("Pages.write", "row % pool.shape[-2], row // pool.shape[-2]", "row % pool.shape[-2], 0 * row"),
        ("tokens_beside", "and page_size % LANES", ""),
        ("tokens_beside", "page_size % (2 * SUBLANES) == 0", "True"),
        ("tokens_beside", '_target.platform() == "tpu"', '_target.platform() != "cpu"'),
    ),
    *group(
        "pallas/tpu_read.py",
        "test_tpu_kernels.py::test_tokens_that_lie_side_by_side",
        ("spread", "(query, zeros), (zeros, query)", "(zeros, query), (query, zeros)"),
        ("Store.scores", "keys = self._cleared(keys, filled)", "pass"),
        ("Store.mix", "_beside(_halves(probs, 1), axis=0)", "_beside(_halves(probs, 1)[::-1], axis=0)"),
        ("Store._cleared", "left, right) > 0", "right, left) > 0"),
        ("restored", "sum(axis=-2)", "max(axis=-2)"),
    ),
    *group(
        "pallas/tpu_decode.py",
        "test_tpu_kernels.py::test_tokens_that_lie_side_by_side",
        ("_side_by_side", "cut.swapaxes(-3, -2)", "cut"),
        ("_side_by_side", "(beside, pages) if back else", "(pages, beside) if back else"),
    ),
    *group(
        "pallas/tpu_append.py",
        "test_tpu_kernels.py::test_a_token_is_written_where_it_belongs",
        ("_in_pages", "row % size + side * size", "row % size"),
        ("_body", "// beside) * block.shape[-2]", "// beside) * (block.shape[-2] // 2)"),
    ),
    *group(
        "pallas/gpu_decode.py",
        "test_gpu_kernels.py::test_pages_as_tpus_like_them",
        ("unsupported", "common.tokens_beside(view, store) > 1", "False"),
    ),
    *group(
        "attend/step.py",
        "test_gpu_kernels.py::test_only_what_nothing_is_done_to_is_rounded",
        ("_attended", "per_head.sinks is None and", ""),
        ("_attended", "len(requests) == 1 and", ""),
    ),
    *group(
        "pallas/gpu_merge.py",
        "test_gpu_kernels.py::test_outputs_are_written_as_the_caller_gets_them",
        (
            "merge",
            "_manual.result((*shape, features), dtype, named)",
            "_manual.result((*shape, features), F32, named)",
        ),
    ),
    # The kit and the adapters ------------------------------------------------------------------------------------
    *group(
        "testing/checks/base.py",
        """
        test_testing.py::test_a_fault_is_found_by_its_check_and_no_other
        test_testing.py::test_what_is_right_passes
        """,
        ("_verdict", "seen & universe == expected & universe", "seen & universe <= expected & universe"),
        ("_verdict", "seen & universe == expected & universe", "seen & universe >= expected & universe"),
        ("_verdict", "len(seen) <= c.budget", "len(seen) <= c.budget + 1"),
        ("attended", "0.25 / (position + 1)", "1.25 / (position + 1)"),
        ("compare", "inaccuracy(out, ref, low)", "None"),
        ("_truth", "plan.padding", '"right"'),
    ),
    *group(
        "testing/checks/leaks.py",
        """
        test_testing.py::test_a_fault_is_found_by_its_check_and_no_other
        """,
        ("_same", "clean.tobytes() == dirty.tobytes()", "clean.shape == dirty.shape"),
        ("_departed", "p > gone and", "p > 100 and"),
        ("_pads", "x[~call.real] = value", "x[~call.real] = 0"),
        ("_neighbours", "x[1:] = x[1:] * x.dtype.type(value)", "x[1:] = x[1:] + 0"),
    ),
    *group(
        "testing/checks/programs.py",
        """
        test_testing.py::test_a_fault_is_found_by_its_check_and_no_other
        """,
        ("_in_place", "memory.temp_size_in_bytes > 0.4", "memory.temp_size_in_bytes > 4"),
        ("_one_program", "fresh.traces.total() > 1", "fresh.traces.total() > 100"),
    ),
    *group(
        "testing/probes.py",
        """
        test_testing.py::test_weights_are_those_that_queries_give
        test_testing.py::test_sizes_are_claims_too
        test_testing.py::test_what_is_right_passes
        """,
        ("attention_weights", "range(0, flat, c.head_dim)", "range(0, min(flat, c.head_dim), c.head_dim)"),
        ("_one_hot", "k * length + int", "k + int"),
    ),
    *group(
        "adapters/keras_hub.py",
        """
        test_adapters.py::test_a_hub_backbone_over_our_caches
        """,
        ("paged_attention", "window=sliding_window", "window=None"),
        ("paged_attention", "softcap=soft_cap", "softcap=None"),
        ("paged_attention", "scale=float(scale)", "scale=None"),
        ("positions", "t - (length - jnp.asarray(num_new, jnp.int32)[:, None])", "t + 0"),
        ("positions", "cache.lengths[:, None] + t", "t + 0 * cache.lengths[:, None]"),
    ),
    *group(
        "adapters/tunix.py",
        """
        test_adapters.py::test_a_sampler_of_tunix_kind
        test_adapters.py::test_the_last_logits_alone_and_a_mask_that_does_not_fit
        """,
        ("SamplerModel.__call__", 'padding="left"', 'padding="right"'),
        ("SamplerModel.__call__", "if length > 1:", "if length > 100:"),
        ("SamplerModel.init_cache", "if self.storage is None", "if True"),
    ),
    *group(
        "adapters/bonsai.py",
        """
        test_adapters.py::test_a_module_that_holds_a_cache
        """,
        ("LayerCache.attend", "_shifted(out, -pads)", "out"),
        ("LayerCache.attend", "_shifted(jnp.asarray(x), pads)", "jnp.asarray(x)"),
        ("Attention.__call__", '"rope": self.rope', '"rope": None'),
    ),
    *group(
        "adapters/flax.py",
        """
        test_adapters.py::test_flax_layers_with_our_attention
        test_adapters.py::test_linen_layers_with_our_attention
        """,
        ("_last", "behind <= window", "behind < window"),
        ("_attend", "jnp.tril(jnp.ones(square, bool))", "jnp.ones(square, bool)"),
    ),
]
