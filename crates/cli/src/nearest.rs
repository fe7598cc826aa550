//! What a person may have meant.

/// Returns the candidate nearest to what was typed, if it is near enough to be
/// a slip of the fingers: a third of its letters at most.
pub(crate) fn to<'a>(typed: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let slips = (typed.chars().count() / 3).max(1);
    candidates
        .map(|candidate| (strsim::damerau_levenshtein(typed, candidate), candidate))
        .filter(|(distance, _)| *distance <= slips)
        .min()
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_slip_is_guessed_and_another_word_is_not() {
        let names = ["web01", "web02", "db01"];
        let to = |typed| super::to(typed, names.into_iter());
        assert_eq!(to("wbe01"), Some("web01"));
        assert_eq!(to("web1"), Some("web01"));
        assert_eq!(to("db1"), Some("db01"));
        assert_eq!(to("mail"), None);
        assert_eq!(to(""), None);
    }
}
