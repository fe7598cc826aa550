//! What is chosen, in which order, and how likely it is to meet a lie.

use super::*;
use crate::strata::scaled;

const CHUNK: u64 = 64 << 10;

fn view(chunks: u64) -> AuditView<'static> {
    AuditView {
        chunks,
        chunk_bytes: CHUNK,
        hot: &[],
        mounted: &[],
        smallest_bytes: u64::MAX,
        mark: "hw-0123456789ab-01KB8Z5E0Q3V8N2J6T4M1C7RXD",
        duty: AuditDuty::Sampled,
        wish: None,
    }
}

fn all(choice: &AuditChoice) -> Vec<u64> {
    let random = choice.anywhere.clone().chain(choice.on_data.clone());
    let random = random.chain(choice.beyond.clone());
    choice.places.iter().copied().chain(random).collect()
}

#[test]
fn hot_blocks_come_first_and_none_twice_or_beyond_the_end() {
    let hot = [90, 7, 5, 1_000_000].map(|chunk| HotChunk { chunk, score: 1 });
    let choice = choose_audit(&AuditView {
        hot: &hot,
        mounted: &[0, 100 * CHUNK - 1, 5 * CHUNK, 101 * CHUNK],
        ..view(100)
    });
    assert_eq!(choice.places, [90, 7, 5, 0, 99]);
}

#[test]
fn an_audit_nobody_asked_for_keeps_to_its_budget() {
    let hot: Vec<_> = (0..500).map(|chunk| HotChunk { chunk, score: 1 }).collect();
    let choice = choose_audit(&AuditView {
        hot: &hot,
        smallest_bytes: 0,
        ..view(1 << 30)
    });
    assert_eq!(choice.reads_max, Some(READS_MAX));
    assert_eq!(choice.time_max, Some(TIME_MAX));
    assert_eq!(choice.places.len(), HOT_MAX);
    assert_eq!(choice.anywhere.draws() + choice.on_data.draws(), RANDOM);
    assert_eq!(all(&choice).len() as u64 + 1, READS_MAX);
}

#[test]
fn what_decides_about_a_mark_or_was_asked_for_is_never_cut_short() {
    let mandatory = AuditDuty::Mandatory(Why::ImageReplaced);
    for (duty, wish, random) in [
        (mandatory, None, 1024),
        (mandatory, Some(AuditWish::Blocks(0)), 1024),
        (mandatory, Some(AuditWish::Blocks(5000)), 5000),
        (AuditDuty::Sampled, Some(AuditWish::Blocks(0)), 0),
        (AuditDuty::Sampled, Some(AuditWish::Blocks(3)), 3),
        (AuditDuty::Sampled, Some(AuditWish::Percent(10)), 100_000),
        (AuditDuty::Sampled, Some(AuditWish::Percent(0)), 0),
        (AuditDuty::Sampled, Some(AuditWish::Percent(100)), 1_000_000),
    ] {
        let choice = choose_audit(&AuditView {
            duty,
            wish,
            ..view(1_000_000)
        });
        assert_eq!((choice.reads_max, choice.time_max), (None, None));
        let count = choice.anywhere.draws() + choice.on_data.draws();
        assert_eq!(count, random, "{duty:?} {wish:?}");
    }
}

#[test]
fn a_hundred_percent_or_more_blocks_than_there_are_is_every_block() {
    for wish in [AuditWish::Percent(100), AuditWish::Blocks(1 << 40)] {
        let choice = choose_audit(&AuditView {
            wish: Some(wish),
            ..view(777)
        });
        assert_eq!(all(&choice), (0..777).collect::<Vec<_>>());
    }
}

#[test]
fn the_choice_is_the_mark_s_alone() {
    let one = all(&choose_audit(&view(1 << 24)));
    assert_eq!(one, all(&choose_audit(&view(1 << 24))));
    let other = AuditView {
        mark: "hw-0123456789ab-01KB8Z5E0Q3V8N2J6T4M1C7RXE",
        ..view(1 << 24)
    };
    assert_ne!(one, all(&choose_audit(&other)));
}

#[test]
fn what_lies_beyond_the_smallest_size_is_spread_to_the_end() {
    let choice = choose_audit(&AuditView {
        smallest_bytes: 1000 * CHUNK + 1,
        ..view(10_000)
    });
    let beyond: Vec<u64> = choice.beyond.collect();
    assert!(beyond.len() > 150);
    assert!(beyond.iter().all(|chunk| (1000..10_000).contains(chunk)));
    assert!(beyond[0] < 1100 && beyond[beyond.len() - 1] > 9900);
}

#[test]
fn one_block_of_each_part_ascending_whatever_the_numbers() {
    for seed in 0..300_u64 {
        let word = mixed(seed);
        let from = word % 1000;
        let len = mixed(word) % 5000;
        let count = mixed(word ^ 9) % 6000;
        let drawn: Vec<u64> = Strata::new(word, from, from + len, count).collect();
        assert_eq!(drawn.len() as u64, count.min(len));
        assert!(drawn.is_sorted_by(|one, next| one < next));
        for (part, chunk) in drawn.iter().enumerate() {
            let width = len.div_ceil(count.min(len));
            let start = from + scaled(part as u64, len, count.min(len));
            assert!((start..start + width).contains(chunk), "{seed}");
        }
    }
    assert_eq!(Strata::new(1, 5, 5, 10).next(), None);
    let last = Strata::new(1, 0, u64::MAX, 1 << 20).last();
    assert!(last.is_some_and(|last| last > u64::MAX - (1 << 44)));
}

/// Over many marks: `k` wrong blocks among `n` are met at least as often as as
/// many free draws would, spread out or side by side.
#[test]
fn wrong_blocks_are_met_as_often_as_the_formula_says() {
    const N: u64 = 4096;
    const MARKS: u32 = 4000;
    for k in [16_u64, 64, 256] {
        for spread in [1, N / k] {
            let hits = (0..MARKS)
                .filter(|mark| {
                    let mark = format!("mark {mark}");
                    let choice = choose_audit(&AuditView {
                        mark: &mark,
                        ..view(N)
                    });
                    let mut drawn = choice.anywhere.chain(choice.on_data);
                    let first = mixed((mark.len() as u64) ^ k) % (N - k * spread + 1);
                    drawn.any(|chunk| {
                        chunk >= first
                            && (chunk - first).is_multiple_of(spread)
                            && (chunk - first) / spread < k
                    })
                })
                .count();
            let share = f64::from(u32::try_from(hits).unwrap()) / f64::from(MARKS);
            let k_of_n = f64::from(u32::try_from(k).unwrap()) / 4096.0;
            let formula = 1.0 - (1.0 - k_of_n).powi(64);
            // Three standard deviations of the measurement.
            let noise = 3.0 * (formula * (1.0 - formula) / f64::from(MARKS)).sqrt();
            assert!(
                share > formula - noise,
                "k {k}, spread {spread}: {share} < {formula}"
            );
        }
    }
}
