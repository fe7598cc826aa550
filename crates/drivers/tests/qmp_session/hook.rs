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
            if let Some(deed) = place.borrow_mut().as_mut() {
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
