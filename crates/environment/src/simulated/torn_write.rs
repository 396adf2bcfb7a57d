//! Torn writes: what of an unsynced write is on disk, page by page.

/// Picks a number below its argument.
pub(super) type Choose<'a> = dyn FnMut(u64) -> u64 + 'a;

/// The pages of `content[from..]` that did not reach the disk, with what stands there instead.
pub(super) fn torn_pages(content: &[u8], from: usize, choose: &mut Choose<'_>) -> Vec<(usize, Vec<u8>)> {
    let mut torn = Vec::new();
    if from >= content.len() {
        return torn;
    }
    let page_bytes = if choose(2) == 0 { 4096 } else { 512 };
    let mut at = from;
    while at < content.len() {
        let end = ((at / page_bytes + 1) * page_bytes).min(content.len());
        match choose(3) {
            0 => {}
            1 => torn.push((at, vec![0; end - at])),
            // Bytes that a deleted file left there.
            _ => torn.push((at, (at..end).map(|i| (i as u8).wrapping_mul(167) ^ 0xa5).collect())),
        }
        at = end;
    }
    torn
}
