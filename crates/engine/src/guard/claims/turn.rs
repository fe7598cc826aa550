//! Whose turn is it? Decides what a claimant does next; does nothing itself.
//!
//! Time is counted in the reader's own beats: each of them is a change at the
//! same VM that has succeeded, so whoever lives could have made one, too.

use std::collections::{BTreeMap, BTreeSet};

use highwater_hypervisor::{ACT_MAX, Claim, Claimer, SignKind, Signs, Stance};
use highwater_model::ClaimId;

use super::BEAT_EVERY;
use super::owner::Life;

/// One that has not beaten while we did so often counts as dead. Two beats may
/// be missed by who gets no processor for a moment.
pub(super) const SILENT_BEATS: u32 = 3;
/// So many beats take longer than what somebody may be about to do can still
/// come: [`ACT_MAX`], and two beats for what libvirt has been told already.
const ACT_BEATS: u64 = ACT_MAX.as_secs() / BEAT_EVERY.as_secs() + 2;

/// What to do next. After all but the first and the last the signs are read again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Move {
    /// The VM is ours.
    Enter,
    /// Set our claim up with this stance.
    Set(Stance),
    /// Remove a sign of one who is dead.
    Remove(ClaimId, SignKind),
    /// Look again in a while.
    Wait {
        /// One that stands there and is known to live.
        living: Option<Claim>,
    },
}

/// A claim that is being taken.
#[derive(Debug)]
pub(super) struct Taking {
    me: ClaimId,
    beats: u64,
    others: BTreeMap<ClaimId, Seen>,
    /// Since which beat of ours nobody owns a sign of acting.
    ownerless: BTreeMap<ClaimId, u64>,
    /// Whose process is known to be gone: what it was about to do went with it.
    gone: BTreeSet<ClaimId>,
}

/// What was seen of another claim.
#[derive(Debug)]
struct Seen {
    beat: Option<u64>,
    /// Our beat when that was first seen.
    since: u64,
    has_beaten: bool,
}

impl Taking {
    pub(super) const fn new(me: ClaimId) -> Self {
        Self {
            me,
            beats: 0,
            others: BTreeMap::new(),
            ownerless: BTreeMap::new(),
            gone: BTreeSet::new(),
        }
    }

    /// Returns how often we have beaten.
    pub(super) const fn beats(&self) -> u64 {
        self.beats
    }

    /// Says that a beat of ours is at the VM.
    pub(super) const fn has_beaten(&mut self) {
        self.beats = self.beats.saturating_add(1);
    }

    /// Decides from all signs, which were read after our claim was set up.
    pub(super) fn turn(
        &mut self,
        signs: &Signs,
        stance: Stance,
        life: &dyn Fn(&Claimer) -> Life,
    ) -> Move {
        if signs.claim(self.me).is_none() {
            // Somebody took us for dead.
            return Move::Set(stance);
        }
        let others = || signs.claims.iter().filter(|claim| claim.id != self.me);
        let lives: Vec<(&Claim, Life)> = others()
            .map(|claim| (claim, life(&claim.claimer)))
            .collect();
        for (claim, known) in &lives {
            let beat = signs.beats.get(&claim.id).copied();
            self.listen(claim.id, beat);
            if *known == Life::Dead {
                self.gone.insert(claim.id);
            }
            if *known == Life::Dead || (*known == Life::Unknown && self.is_silent(claim.id)) {
                return Move::Remove(claim.id, SignKind::Claim);
            }
        }
        if let Some(burial) = self.bury(signs) {
            return burial;
        }
        let standing: Vec<&(&Claim, Life)> = lives
            .iter()
            .filter(|(claim, _)| claim.stance == Stance::Stands)
            .collect();
        let is_living = |(claim, known): &&&(&Claim, Life)| {
            *known == Life::Lives || self.others.get(&claim.id).is_some_and(|it| it.has_beaten)
        };
        let living = standing.iter().find(is_living);
        let wait = Move::Wait {
            living: living.map(|(claim, _)| (*claim).clone()),
        };
        match stance {
            Stance::Yields if standing.is_empty() => Move::Set(Stance::Stands),
            Stance::Yields => wait,
            Stance::Stands if standing.iter().any(|(claim, _)| claim.id < self.me) => {
                Move::Set(Stance::Yields)
            }
            Stance::Stands if standing.is_empty() && self.ownerless.is_empty() => Move::Enter,
            Stance::Stands => wait,
        }
    }

    fn listen(&mut self, id: ClaimId, beat: Option<u64>) {
        let beats = self.beats;
        let seen = self.others.entry(id).or_insert(Seen {
            beat,
            since: beats,
            has_beaten: false,
        });
        if seen.beat != beat {
            *seen = Seen {
                beat,
                since: beats,
                has_beaten: true,
            };
        }
    }

    fn is_silent(&self, id: ClaimId) -> bool {
        let since = self.others.get(&id).map_or(self.beats, |seen| seen.since);
        // The first of them may have come right after we looked.
        self.beats.saturating_sub(since) > u64::from(SILENT_BEATS)
    }

    /// Removes what is left of those without a claim, and notes who may still be
    /// acting.
    fn bury(&mut self, signs: &Signs) -> Option<Move> {
        let beat = signs.beats.keys().find(|id| signs.claim(**id).is_none());
        if let Some(id) = beat {
            return Some(Move::Remove(*id, SignKind::Beat));
        }
        let without_claim = |id: &&ClaimId| signs.claim(**id).is_none();
        self.ownerless.retain(|id, _| signs.acting.contains(id));
        for id in signs.acting.iter().filter(without_claim) {
            let since = *self.ownerless.entry(*id).or_insert(self.beats);
            let is_over = self.beats.saturating_sub(since) > ACT_BEATS;
            if is_over || self.gone.contains(id) {
                return Some(Move::Remove(*id, SignKind::Acting));
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use highwater_model::Timestamp;

    use super::*;

    fn id(n: u8) -> ClaimId {
        ClaimId::from_bytes([n; 8])
    }

    fn claim(n: u8, stance: Stance) -> Claim {
        Claim {
            id: id(n),
            stance,
            claimer: Claimer {
                host: format!("host{n}"),
                boot_id: String::new(),
                pid_namespace: None,
                process: n.into(),
                start_ticks: None,
                since: Timestamp::from_unix_ms(0),
            },
        }
    }

    fn signs(claims: &[(u8, Stance)]) -> Signs {
        Signs {
            claims: claims.iter().map(|(n, it)| claim(*n, *it)).collect(),
            ..Signs::default()
        }
    }

    const fn unknown(_: &Claimer) -> Life {
        Life::Unknown
    }

    fn waits(living: Option<u8>) -> Move {
        Move::Wait {
            living: living.map(|n| claim(n, Stands)),
        }
    }

    use Stance::{Stands, Yields};

    #[test]
    fn nobody_enters_beside_another_that_stands_and_the_smaller_id_stays() {
        let check = |found: &[(u8, Stance)], mine: Stance, expected: Move| {
            let turn = Taking::new(id(5)).turn(&signs(found), mine, &unknown);
            assert_eq!(turn, expected, "{found:?}");
        };
        check(&[(5, Stands)], Stands, Move::Enter);
        check(
            &[(5, Stands), (6, Yields), (4, Yields)],
            Stands,
            Move::Enter,
        );
        check(&[(5, Stands), (6, Stands)], Stands, waits(None));
        check(&[(5, Stands), (4, Stands)], Stands, Move::Set(Yields));
        check(&[(5, Yields), (4, Stands)], Yields, waits(None));
        check(&[(5, Yields), (6, Stands)], Yields, waits(None));
        check(&[(5, Yields), (4, Yields)], Yields, Move::Set(Stands));
        // Somebody has removed it.
        check(&[(4, Stands)], Stands, Move::Set(Stands));
        check(&[], Yields, Move::Set(Yields));
    }

    #[test]
    fn who_is_known_to_live_is_waited_for_however_silent() {
        let mut taking = Taking::new(id(5));
        let both = signs(&[(5, Stands), (6, Stands)]);
        for _ in 0..100 {
            let turn = taking.turn(&both, Stands, &|_| Life::Lives);
            assert_eq!(turn, waits(Some(6)));
            taking.has_beaten();
        }
        let burial = Move::Remove(id(6), SignKind::Claim);
        assert_eq!(taking.turn(&both, Stands, &|_| Life::Dead), burial);
    }

    #[test]
    fn who_cannot_be_seen_is_dead_after_missing_three_beats_and_not_before() {
        let mut taking = Taking::new(id(5));
        let mut found = signs(&[(5, Stands), (6, Stands)]);
        let burial = Move::Remove(id(6), SignKind::Claim);
        // Without a beat of ours nobody is dead, however often it is looked.
        for _ in 0..100 {
            assert_eq!(taking.turn(&found, Stands, &unknown), waits(None));
        }
        for beat in 0..50 {
            for _ in 0..SILENT_BEATS {
                taking.has_beaten();
                assert_ne!(taking.turn(&found, Stands, &unknown), burial);
            }
            found.beats.insert(id(6), beat);
            assert_eq!(taking.turn(&found, Stands, &unknown), waits(Some(6)));
        }
        for _ in 0..SILENT_BEATS {
            taking.has_beaten();
            assert_eq!(taking.turn(&found, Stands, &unknown), waits(Some(6)));
        }
        taking.has_beaten();
        assert_eq!(taking.turn(&found, Stands, &unknown), burial);
    }

    #[test]
    fn who_may_still_be_acting_keeps_everybody_out_until_it_is_too_late_for_it() {
        let mut taking = Taking::new(id(5));
        let mut found = signs(&[(5, Stands)]);
        found.acting.insert(id(6));
        for _ in 0..=ACT_BEATS {
            assert_eq!(taking.turn(&found, Stands, &unknown), waits(None));
            taking.has_beaten();
        }
        let over = Move::Remove(id(6), SignKind::Acting);
        assert_eq!(taking.turn(&found, Stands, &unknown), over);
        // It has ended by itself.
        found.acting.clear();
        assert_eq!(taking.turn(&found, Stands, &unknown), Move::Enter);
        assert!(u64::from(SILENT_BEATS) < ACT_BEATS);
        assert!(BEAT_EVERY.as_secs() * ACT_BEATS > ACT_MAX.as_secs());
    }

    #[test]
    fn who_is_known_to_be_gone_acts_no_more() {
        let mut taking = Taking::new(id(5));
        let mut found = signs(&[(5, Stands), (6, Stands)]);
        found.acting.insert(id(6));
        found.beats.insert(id(6), 3);
        let dead = |_: &Claimer| Life::Dead;
        for kind in [SignKind::Claim, SignKind::Beat, SignKind::Acting] {
            let turn = taking.turn(&found, Stands, &dead);
            assert_eq!(turn, Move::Remove(id(6), kind));
            match kind {
                SignKind::Claim => found.claims.truncate(1),
                SignKind::Beat => found.beats.clear(),
                SignKind::Acting => found.acting.clear(),
            }
        }
        assert_eq!(taking.turn(&found, Stands, &dead), Move::Enter);
    }

    /// What one of several does: its program counter is the stance that it has
    /// set up, and whether it has read since.
    #[derive(Debug, Clone, PartialEq, Eq)]
    enum At {
        Start,
        Reading(Stance),
        Setting(Stance),
        In,
        Left,
    }

    /// All ways in which the steps of three can be interleaved, each of which may
    /// be stopped anywhere for ever.
    #[test]
    fn however_three_interleave_never_two_are_in_and_somebody_can_always_go_on() {
        type World = (Vec<At>, Vec<Option<Stance>>);
        let mut seen = BTreeSet::new();
        let mut open: Vec<World> = vec![(vec![At::Start; 3], vec![None; 3])];
        let mut entered = 0;
        while let Some(world) = open.pop() {
            if !seen.insert(format!("{world:?}")) {
                continue;
            }
            let (at, set) = &world;
            let inside = at.iter().filter(|it| **it == At::In).count();
            assert!(inside <= 1, "{world:?}");
            entered += inside;
            let mut moved = false;
            for n in 0..3_u8 {
                let (mut at, mut set): World = (at.clone(), set.clone());
                let place = usize::from(n);
                at[place] = match at[place].clone() {
                    At::Start => {
                        set[place] = Some(Stands);
                        At::Reading(Stands)
                    }
                    At::Setting(stance) => {
                        set[place] = Some(stance);
                        At::Reading(stance)
                    }
                    At::Reading(stance) => {
                        let all = (0_u8..).zip(&set);
                        let found: Vec<(u8, Stance)> =
                            all.filter_map(|(n, it)| Some((n, (*it)?))).collect();
                        match Taking::new(id(n)).turn(&signs(&found), stance, &unknown) {
                            Move::Enter => At::In,
                            Move::Set(stance) => At::Setting(stance),
                            Move::Wait { .. } | Move::Remove(..) => At::Reading(stance),
                        }
                    }
                    At::In => {
                        set[place] = None;
                        At::Left
                    }
                    At::Left => At::Left,
                };
                moved |= (&at, &set) != (&world.0, &world.1);
                open.push((at, set));
            }
            assert!(
                moved || at.iter().all(|it| *it == At::Left),
                "stuck: {world:?}"
            );
        }
        assert!(entered > 0 && seen.len() > 100, "{} states", seen.len());
    }
}
