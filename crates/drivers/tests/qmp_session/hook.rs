//! Makes something happen at each step of a driver's, in the thread that it
//! runs in.

use std::cell::RefCell;

use highwater_model::step::{Step, on_step};

type Deed = Box<dyn FnMut(Step)>;

thread_local! {
    static DEED: RefCell<Option<Deed>> = const { RefCell::new(None) };
}

/// Does `deed` at each step from here on, instead of what was done before.
pub(crate) fn at_each_step(deed: impl FnMut(Step) + 'static) {
    on_step(|step| {
        DEED.with(|place| {
            // What a deed does itself passes steps, too.
            if let Ok(mut place) = place.try_borrow_mut()
                && let Some(deed) = place.as_mut()
            {
                deed(step);
            }
        });
    });
    DEED.with(|place| *place.borrow_mut() = Some(Box::new(deed)));
}

/// Does nothing any more.
pub(crate) fn at_no_step() {
    DEED.with(|place| *place.borrow_mut() = None);
}
